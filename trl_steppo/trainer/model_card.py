"""The README of a saved model: its base model, its dataset and its method."""

from __future__ import annotations

from importlib.metadata import version

from huggingface_hub import ModelCard, ModelCardData

from .. import __version__

_BODY = """\
# {name}

{origin}It was trained with {method} ([{title}](https://huggingface.co/papers/{paper})), by
[trl-steppo](https://pypi.org/project/trl-steppo) on top of [TRL](https://github.com/huggingface/trl).

## Versions

{versions}

## Citation

```bibtex
{citation}
```
"""
_LISTED_PACKAGES = ("trl", "transformers", "torch", "datasets", "tokenizers")


def model_card(
    *, name: str, base_model: str | None, dataset: str | None, tags: list[str], method: str, paper: dict[str, str]
) -> ModelCard:
    """
    Make the model card of a saved model.

    Args:
        name (`str`):
            The model's name.
        base_model (`str`, *optional*):
            The model on the Hub from which it was trained.
        dataset (`str`, *optional*):
            The dataset on the Hub on which it was trained.
        tags (`list[str]`):
            Its tags on the Hub.
        method (`str`):
            The training method's name.
        paper (`dict`):
            `title`, `id` (of arXiv) and `citation` (BibTeX) of the method's paper.
    """
    data = ModelCardData(
        base_model=base_model,
        datasets=dataset,
        library_name="transformers",
        model_name=name,
        tags=["generated_from_trainer", *sorted(tags)],
    )
    link = f"[{base_model}](https://huggingface.co/{base_model})"
    versions = {"trl-steppo": __version__, **{package: version(package) for package in _LISTED_PACKAGES}}
    body = _BODY.format(
        name=name,
        origin=f"This model is a fine-tuned version of {link}. " if base_model else "",
        method=method,
        title=paper["title"],
        paper=paper["id"],
        versions="\n".join(f"- {package} {number}" for package, number in versions.items()),
        citation=paper["citation"].strip(),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")
