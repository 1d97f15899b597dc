"""What this package uses of transformers in Jupyter. Importing it needs IPython."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import find

if TYPE_CHECKING:
    from transformers.utils.notebook import NotebookProgressCallback as NotebookProgressCallback
else:
    NotebookProgressCallback = find("transformers.utils.notebook.NotebookProgressCallback")
