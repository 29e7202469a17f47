"""What is imported as `ftload`: `load_prepared`, which loads what was prepared, and the version.

Nothing else is imported before one of them is used: `import ftload` costs a program nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

# this folder is installed as `ftload`, with `loaders` and `cli` in it: by these names they are found then
if TYPE_CHECKING:
    from ftload.loaders.load import load_prepared  # pyright: ignore[reportMissingImports]

    __version__: str

__all__ = ["__version__", "load_prepared"]


def __getattr__(name: str) -> Any:
    if name == "load_prepared":
        from ftload.loaders.load import load_prepared  # pyright: ignore[reportMissingImports]

        return load_prepared
    if name == "__version__":
        from ftload.loaders.system.versions import ftload_version  # pyright: ignore[reportMissingImports]

        return ftload_version()
    raise AttributeError(f"module `{__name__}` has no attribute `{name}`")
