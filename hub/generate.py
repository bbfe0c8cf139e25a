"""`model.generate(..., custom_generate=<this repository>, trust_remote_code=True)`: see the README of the repository."""

from typing import Any

from transformers import Cache, GenerationMixin, PreTrainedModel

from .cache import SinkWindowCache
from .endless_loop import endless as endless_loop
from .internals import cache_kwargs, take_cache

# What says where this code comes from. It reaches the function as well, and is no argument of the model.
_OF_THE_LOADER = (
    "cache_dir",
    "force_download",
    "proxies",
    "token",
    "revision",
    "local_files_only",
    "repo_type",
    "trust_remote_code",
)


def generate(
    *args: Any,
    model: PreTrainedModel,
    n_sink: int | None = None,
    window: int | None = None,
    compileable: bool | None = None,
    endless: bool = False,
    keep_tokens: int | None = None,
    num_sink_tokens: int | None = None,
    window_length: int | None = None,
    **kwargs: Any,
) -> Any:
    """Generates with a `SinkWindowCache`: all that the model's own `generate()` does, in constant memory.

    Args:
        args, kwargs: what the model's own `generate()` takes.
        n_sink (`int`, *optional*, defaults to 4): how many of the first tokens to keep for ever.
        window (`int`, *optional*, defaults to 1020): how many of the last tokens to keep, beside the sinks.
        compileable (`bool`, *optional*, defaults to `False`): keep all shapes constant, so that steps can be compiled.
        endless (`bool`, *optional*, defaults to `False`): go on until told to stop, and keep only the last tokens.
        keep_tokens (`int`, *optional*): with `endless`, how many tokens to keep and return; by default `n_sink + window`.
        num_sink_tokens (`int`, *optional*): the older name of `n_sink`.
        window_length (`int`, *optional*): `n_sink + window`, an older argument.

    Returns:
        what the model's own `generate()` returns; with `endless` only the last `keep_tokens` tokens of the text.

    Raises:
        TypeError: for another cache than one that this function made, or arguments of the wrong type.
        ValueError: for arguments that contradict each other.
        NotImplementedError: for a model whose positions the cache cannot move, with the reason.
    """
    kwargs = {name: value for name, value in kwargs.items() if name not in _OF_THE_LOADER}
    sizes = _sizes(n_sink, window, num_sink_tokens, window_length)
    if kwargs.get("use_cache") is False:
        raise ValueError("use_cache=False leaves no cache to make constant in size. Leave use_cache out.")
    if isinstance(code := kwargs.get("custom_generate"), str):
        raise ValueError(
            f"custom_generate={code!r} cannot run inside this model's generate(), which is that of a SinkWindowCache "
            "already. Leave it out, or load the model without trust_remote_code."
        )
    cache = take_cache(kwargs)
    if cache is None:
        sizes = {"n_sink": 4, "window": 1020} | sizes
        cache = SinkWindowCache(**sizes, compileable=False if compileable is None else compileable)
    else:
        _check_given(cache, sizes | ({} if compileable is None else {"compileable": compileable}))
    if endless:
        if code is not None:
            raise ValueError("endless=True is a decoding loop, and custom_generate is another. Leave one of them out.")
        kwargs |= {"custom_generate": endless_loop, "keep_tokens": keep_tokens}
    elif keep_tokens is not None:
        raise ValueError(f"keep_tokens={keep_tokens} is for endless=True. Without it, generate() returns all tokens.")
    # A model that was loaded from a repository with this code has this function in the place of its class's generate().
    own_generate = type(model).generate if "generate" in vars(model) else GenerationMixin.generate
    return own_generate(model, *args, **kwargs, **cache_kwargs(cache))


def _sizes(
    n_sink: int | None, window: int | None, num_sink_tokens: int | None, window_length: int | None
) -> dict[str, int]:
    """The sizes that the user has given, as `SinkWindowCache` calls them."""
    for name, value, older, older_value in (
        ("n_sink", n_sink, "num_sink_tokens", num_sink_tokens),
        ("window", window, "window_length", window_length),
    ):
        if value is not None and older_value is not None:
            raise ValueError(f"{name}={value} and {older}={older_value} say the same. Give {name} alone.")
    n_sink = num_sink_tokens if n_sink is None else n_sink
    if window_length is not None:
        n_sink = 4 if n_sink is None else n_sink
        if window_length <= n_sink:
            raise ValueError(
                f"window_length counts the sinks, too, so it must be more than their number, {n_sink}, but is {window_length}"
            )
        window = window_length - n_sink
    return {name: value for name, value in (("n_sink", n_sink), ("window", window)) if value is not None}


def _check_given(cache: Any, asked: dict[str, Any]) -> None:
    """Whether a cache that the user has given can be used, and is what he asks for."""
    if not isinstance(cache, SinkWindowCache):
        kind = type(cache).__name__
        copy = ", of another copy of this code" if isinstance(cache, Cache) and kind == SinkWindowCache.__name__ else ""
        raise TypeError(
            f"the cache is a {kind}{copy}. Leave it out, and one is made; to go on with a text, give the cache that this "
            "generate() returned with return_dict_in_generate=True; for any other cache leave custom_generate out."
        )
    for name, value in asked.items():
        if getattr(cache, name) != value:
            raise ValueError(f"{name}={value}, but the cache that was given has {name}={getattr(cache, name)}")
