"""What is checked before a run starts."""

from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from kedro.framework.hooks import hook_impl
from kedro.io import CatalogProtocol
from kedro.pipeline import Pipeline


class UnwritableFolderError(OSError):
    """Results could not be saved where the catalog puts them."""


class WritableDataHook:
    """Refuses to start work whose results could not be saved."""

    @hook_impl
    def before_pipeline_run(
        self, run_params: dict[str, Any], pipeline: Pipeline, catalog: CatalogProtocol[Any, Any]
    ) -> None:
        """Try to write into the folder of each output.

        Raises:
            UnwritableFolderError: naming the first folder that cannot be written.
        """
        folders = set()
        for name in pipeline.outputs() | pipeline.all_outputs():
            dataset = catalog.get(name)
            description = dataset._describe() if dataset is not None else {}
            if "filepath" in description:
                folders.add(Path(description["filepath"]).parent)
            elif "path" in description:
                folders.add(Path(description["path"]))
        for folder in sorted(folders):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with TemporaryFile(dir=folder):
                    pass
            except OSError as error:
                raise UnwritableFolderError(
                    f"the data folder {folder} cannot be written ({error.strerror}); make it "
                    f"writable or choose another with --params data_folder=…"
                ) from error
