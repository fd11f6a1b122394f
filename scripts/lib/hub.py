"""Released models on the Hugging Face hub: fetched by name and commit."""

from __future__ import annotations

import functools
from pathlib import Path

from scripts.lib.errors import UserError

WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
"""What is fetched: nothing pickled, no code."""
ADAPTER = "adapter_config.json"
"""With it, Transformers loads the base that it names, whatever lies beside it."""
ADVICE = "its base is elsewhere: merge it into that by PEFT, and name what was saved"
NEEDED = ("config.json", "*.safetensors", "tokenizer.json")


@functools.cache
def fetch(parent: str) -> Path:
    """The folder of `hf:org/name@revision` in the hub's cache, fetched where it is not.

    Raises UserError where the hub has not got it, or it is no whole model.
    """
    name, _, revision = parent.removeprefix("hf:").partition("@")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=WANTED))
    except RevisionNotFoundError as error:
        hint = f"see https://huggingface.co/{name}/commits/main"
        raise UserError(name, f"has no revision {revision}", hint) from error
    except GatedRepoError as error:
        hint = f"ask for it at https://huggingface.co/{name}, then set HF_TOKEN"
        raise UserError(name, "is given to some only", hint) from error
    except RepositoryNotFoundError as error:
        hint = "check the name; for a private one, set HF_TOKEN"
        raise UserError(name, "no such model on the hub", hint) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            name,
            f"revision {revision} is not in the hub's cache here, and the hub was not "
            f"reached: {str(error).splitlines()[0]}",
            "where there is a network: hf download "
            f"{name} --revision {revision}; or name a local folder",
        ) from error
    if (folder / ADAPTER).exists():
        raise UserError(f"{name} at {revision}", "is an adapter", ADVICE)
    for needed in NEEDED:
        if not any(folder.glob(needed)):
            raise UserError(f"{name} at {revision}", f"holds no {needed}")
    return folder
