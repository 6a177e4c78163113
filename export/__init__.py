"""The training half: from a table or a network to a bundle. torch lives here and nowhere else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export.exporting import Exported, export_model

__all__ = ["Exported", "export_model"]


def __getattr__(name: str) -> Any:
    """`export.export_model`, which brings torch with it when it is asked for and not before."""
    if name in __all__:
        from export import exporting

        return getattr(exporting, name)
    raise AttributeError(f"module 'export' has no attribute '{name}'")
