"""Code shared by the scripts. `engine.load` opens a checkpoint for prediction (see engine.predictor)."""

from typing import TYPE_CHECKING, Any

from utils import InputError

if TYPE_CHECKING:
    from .predictor import Prediction, Predictor, load

__all__ = ["InputError", "Prediction", "Predictor", "load"]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import names lazily, on first use, so that `import engine` alone is fast."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import predictor  # noqa: PLC0415

    return getattr(predictor, name)
