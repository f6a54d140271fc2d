"""Uploads an adapter to the Hugging Face hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mezo._inputs import one_line
from mezo.config import TrainConfig


class UploadError(RuntimeError):
    """The hub did not take an adapter; it is on the disk."""


@dataclass(frozen=True)
class Upload:
    """An upload that is due after a training.

    Args:
        repository: its name, "user/name" or "name".
    """

    repository: str

    @classmethod
    def of(cls, settings: TrainConfig) -> Upload | None:
        """Return what a training asks for, or None for nothing.

        Raises:
            ValueError: nobody is logged in.
        """
        if not settings.push_to_hub:
            return None
        from huggingface_hub import get_token

        if get_token() is None:
            raise ValueError(
                "train: push_to_hub must have a token, got none; run `hf auth login`, or set "
                "HF_TOKEN."
            )
        return cls(settings.hub_model_id or settings.output.resolve().name)

    def __call__(self, directory: Path) -> None:
        """Upload the directory; what fails is said, and changes nothing here.

        Raises:
            UploadError: the hub cannot be reached or refuses.
        """
        from huggingface_hub import HfApi

        try:
            api = HfApi()
            name = api.create_repo(self.repository, exist_ok=True).repo_id
            api.upload_folder(repo_id=name, folder_path=directory)
        except Exception as error:
            words = one_line(error)
            raise UploadError(
                f"train: the hub must take the adapter, got {type(error).__name__}: {words[:200]}; "
                f"it is in {directory}: upload it with `hf upload {self.repository} {directory}`."
            ) from error
        print(f"Uploaded the adapter to {name}.")
