import gc
from collections.abc import Iterator

import pytest
import torch
from small import small_tokenizer

from gq_lightning import ImageTokenizer

# what Lightning says of its own dependencies and of a machine without many cores; everything of ours stays an error
LIGHTNING = (
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning",
    "ignore:.*does not have many workers.*",
    "ignore:.*LeafSpec.*:FutureWarning",
    "ignore:.*LeafSpec.*",
    "ignore:.*args parameter is intended to run from within Python.*",
    "ignore:.*exists and is not empty.*",
    "ignore:.*is not supported by the model summary.*",
    "ignore:.*dataloader is not resumable.*",
    "ignore:.*no pre-optimization state was saved.*",
    "ignore:.*callbacks used to create the checkpoint need to be provided.*",
    # a loader that is dropped in the middle may hear, while it tidies up, that a worker has gone already
    "ignore:.*_MultiProcessingDataLoaderIter.__del__.*:pytest.PytestUnraisableExceptionWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for line in LIGHTNING:
            item.add_marker(pytest.mark.filterwarnings(line))


def pytest_collection_finish() -> None:
    """What the imports made stays: walking through it again and again took a fifth of the time of tests that start trainings."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield


@pytest.fixture(params=["vit", "unet"])
def tokenizer(request: pytest.FixtureRequest) -> ImageTokenizer:
    """A small untrained tokenizer: ViT (fixed window of 32 pixels) or UNet (any multiple of 8), 2 tokens of 8 bits."""
    return small_tokenizer(request.param)
