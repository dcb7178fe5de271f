"""The page in a real browser: `make test-web`, which sees to Chromium (`.ci/chromium`). Screenshots go to $SCREENSHOTS, if set."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small import small_training

from gq_lightning import ImageTokenizer
from gq_lightning.cli.web.work import shown
from gq_lightning.priors import Prior
from gq_lightning.quantizers import GaussianQuantizer
from gq_lightning.tokenizer.box import names

pytestmark = [pytest.mark.web, pytest.mark.filterwarnings("ignore")]
WIDTHS = (1280, 390)


def picture(path: Path, width: int, height: int) -> Path:
    """Smooth colours, as a photograph has, and a bright square."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    pixels = np.stack([x, y, 0.5 + 0.4 * np.sin(9 * x * y)], axis=-1)
    pixels[height // 4 : height // 2, width // 4 : width // 2] = 0.95
    Image.fromarray(np.uint8(255 * pixels)).save(path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer whose tokens can be cut short, a prior of its tokens, and what is uploaded."""
    root = tmp_path_factory.mktemp("web")
    tokenizer = small_training("unet", GaussianQuantizer(16, latent_channels=4, codebook_size=256, order="tree")).tokenizer.eval()
    tokenizer.save_pretrained(root / "tree")
    prior = Prior((4, 4, 2), 256, 8, tokenizer.fingerprint, ["cat", "dog"], width=16, layers=1, heads=2, head_layers=1)
    prior.save_pretrained(root / "prior")
    tokenizer.save_pretrained(root / "prior/tokenizer")
    picture(root / "photo.png", 200, 136)
    picture(root / "large.png", 3000, 2000)
    (root / "broken.png").write_bytes((root / "photo.png").read_bytes()[:300])
    (root / "heavy.png").write_bytes(os.urandom(21 * 10**6))
    return root


@pytest.fixture(scope="module")
def url(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from gq_lightning.cli.web.page import page, serve
    from gq_lightning.cli.web.work import Work

    work = Work([*names(), str(files / "tree")], str(files / "prior"), "cpu", 1, tmp_path_factory.mktemp("served"))
    blocks = page(work)
    yield serve(blocks, "127.0.0.1", 0, block=False)
    blocks.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # GQ_CHROMIUM is where .ci/chromium found one that is not playwright's own
        browser = playwright.chromium.launch(executable_path=os.environ.get("GQ_CHROMIUM") or None)
        yield browser
        browser.close()


class View:
    """One tab, and what a person does in it."""

    def __init__(self, browser, url: str, width: int) -> None:  # type: ignore[no-untyped-def]
        self.tab = browser.new_page(viewport={"width": width, "height": 900}, accept_downloads=True)
        self.tab.set_default_timeout(180_000)
        self.asked: list[str] = []
        self.tab.on("request", lambda request: self.asked.append(request.url))
        self.tab.goto(url, wait_until="domcontentloaded")
        self.tab.wait_for_selector("#upload input[type=file]", state="attached")

    def upload(self, path: Path) -> None:
        if (close := self.tab.locator("#upload button[aria-label='Clear'], #upload button[aria-label='Remove this file']")).count():
            close.first.click()
            self.tab.wait_for_selector("#sizes table", state="detached")
        self.tab.set_input_files("#upload input[type=file]", path)

    def sizes(self) -> dict[str, int]:
        """The table's bytes by what they are of."""
        self.tab.wait_for_selector("#sizes table")
        rows = self.tab.locator("#sizes tbody tr").all()
        cells = [[cell.inner_text() for cell in row.locator("td").all()] for row in rows]
        return {re.sub(", quality.*", "", cell[0]): int(cell[1].replace(",", "")) for cell in cells}

    def visible(self) -> set[str]:
        return {name for name in ("original", "decoded", "jpeg", "difference", "heat") if self.tab.locator(f"#{name} img").count()}

    def notice(self) -> str:
        return str(self.tab.wait_for_selector("#notice p").inner_text())

    def choose(self, tokenizer: str) -> None:
        self.tab.click("#tokenizer input")
        self.tab.get_by_role("option", name=shown(tokenizer)).click()

    def shoot(self, name: str) -> None:
        if folder := os.environ.get("SCREENSHOTS"):
            self.tab.wait_for_timeout(1500)
            self.tab.screenshot(path=f"{folder}/{name}.png", full_page=True)


@pytest.mark.parametrize("width", WIDTHS)
def test_upload_slide_download_and_upload_again(browser: object, url: str, files: Path, width: int, tmp_path: Path) -> None:
    view = View(browser, url, width)
    view.shoot(f"empty_{width}")
    view.upload(files / "photo.png")
    sizes = view.sizes()
    assert list(sizes) == ["as uploaded", "PNG", "token file", "JPEG"]
    assert sizes["as uploaded"] == (files / "photo.png").stat().st_size
    assert view.visible() == {"original", "decoded", "jpeg", "difference"}  # its bits are exact: there is no map
    assert "16.00 everywhere" in view.tab.inner_text("#heat-says")
    view.shoot(f"picture_{width}")

    # another tokenizer, which has a map, and whose tokens can be cut short
    view.choose(str(files / "tree"))
    view.tab.wait_for_selector("#heat img")
    assert "the codebook has 8" in view.tab.inner_text("#heat-says")
    before = view.sizes()["token file"]
    handle = view.tab.locator("#bits input[type=range]")
    handle.focus()
    for _ in range(4):
        view.tab.keyboard.press("ArrowLeft")
    handle.dispatch_event("pointerup")
    view.tab.wait_for_function(f"!document.querySelector('#sizes').innerText.includes('{before:,}')")
    assert view.sizes()["token file"] < before
    view.shoot(f"rate_{width}")

    with view.tab.expect_download() as downloading:
        view.tab.click("#download")
    file = tmp_path / downloading.value.suggested_filename
    downloading.value.save_as(file)
    assert file.name == "photo.png.tokens"
    assert file.stat().st_size == view.sizes()["token file"]

    # whatever tokenizer is chosen, a token file is decoded by the one that made it
    view.choose(names()[0])
    view.upload(file)
    assert list(view.sizes()) == ["token file", "decoded, as PNG"]
    assert view.visible() == {"decoded"}
    view.shoot(f"tokens_{width}")

    view.tab.click("#complete")
    assert "a token file cannot be completed" in view.notice()
    view.upload(files / "photo.png")
    view.sizes()
    view.tab.click("#complete")
    view.tab.wait_for_selector("#completed img")
    view.shoot(f"completed_{width}")
    assert all(address.startswith((url, "data:", "blob:")) for address in view.asked if "iframe-resizer" not in address), view.asked


@pytest.mark.parametrize("width", WIDTHS)
def test_what_is_wrong_with_an_upload_is_a_sentence(browser: object, url: str, files: Path, width: int, tmp_path: Path) -> None:
    other = ImageTokenizer.from_pretrained(files / "tree")
    other.backbone.decoder.conv_out.bias.data += 1
    other.save_pretrained(tmp_path / "other")
    from gq_lightning.cli.main import main

    assert main(["encode", str(files / "photo.png"), f"--tokenizer={tmp_path / 'other'}", f"--out={tmp_path}"]) == 0
    (tmp_path / "damaged.tokens").write_bytes((tmp_path / "photo.png.tokens").read_bytes()[:-5])
    view = View(browser, url, width)
    for path, said in (
        (files / "broken.png", "broken.png: "),
        (files / "large.png", "3000x2000 pixels are more than the 4.2 million"),
        (tmp_path / "photo.png.tokens", "which is not on this page: start it with --tokenizer"),
        (tmp_path / "damaged.tokens", "damaged.tokens: "),
    ):
        view.tab.reload()
        view.tab.wait_for_selector("#upload input[type=file]", state="attached")
        view.upload(path)
        notice = view.notice()
        assert said in notice
        assert not {"Traceback", str(files), str(tmp_path), "/tmp"} & {word for word in re.split(r"[\s:]", notice)}, notice
        assert not view.visible()
    view.shoot(f"error_{width}")
    view.tab.reload()
    view.tab.wait_for_selector("#upload input[type=file]", state="attached")
    view.upload(files / "heavy.png")
    assert "exceed" in view.tab.wait_for_selector(".toast-body").inner_text().lower()
