"""A page in the browser to try a tokenizer on pictures."""

from jsonargparse.typing import PositiveInt

from gq_lightning.errors import UserError

MOST_PORT = 65535


def run(
    *,
    tokenizer: str | None = None,
    prior: str | None = None,
    address: str = "127.0.0.1",
    port: PositiveInt = 7860,  # type: ignore[assignment]
    device: str = "auto",
    threads: PositiveInt | None = None,
) -> None:
    """A page in the browser: original, decoded, difference, bits per token, sizes; token files to download and upload.

    Args:
        tokenizer: a name of `models`, folder of a tokenizer or a run, or owner/repository on the hub; those in the box are there too
        prior: folder of a prior or of its run, or owner/repository on the hub, to complete pictures from their upper half
        address: to listen at; the default is seen by this machine alone, 0.0.0.0 by the network
        port: to listen at
    """
    import os
    import socket
    import tempfile
    from importlib.util import find_spec
    from pathlib import Path

    from gq_lightning.cli.web.work import Work
    from gq_lightning.tokenizer.box import names

    if find_spec("gradio") is None:
        raise UserError("web: gradio is not installed: pip install 'gq_lightning[web]'")
    if port > MOST_PORT:
        raise UserError(f"--port {port}: nothing can listen there: choose one from 1 to {MOST_PORT}")
    try:
        socket.create_server((address, port)).close()
    except OSError as error:
        raise UserError(f"--address {address} --port {port}: nothing can listen there ({error.strerror}): choose others") from error
    choices = names() if tokenizer is None else [tokenizer, *(name for name in names() if name != tokenizer)]
    with tempfile.TemporaryDirectory(prefix="gq_lightning_") as folder:
        work = Work(choices, prior, device, threads, Path(folder))
        work.load(choices[0])  # what is wrong with it is said here, not on the page
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        from gq_lightning.cli.web.page import page, serve

        print(f"http://{address}:{port} (Ctrl-C ends it)", flush=True)
        serve(page(work), address, port)
