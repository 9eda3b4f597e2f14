"""Draw the images of the documentation: python docs/make_pictures.py [WORKSPACE].

All images are drawn by lsmix from the digits that come with it. This trains the flow of the demo recipe, in one to
three minutes on a core, unless the workspace (default ``runs``) already contains it.
"""

import sys
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from lsmix.data.atomic import write_atomic
from lsmix.data.dataset import open_dataset
from lsmix.data.latents import open_latents
from lsmix.glow.checkpoint import load_flow
from lsmix.glow.config import FlowConfig
from lsmix.pipeline.api import run
from lsmix.pipeline.config.recipes import recipe_path
from lsmix.pipeline.naturalness.regions import second_region
from lsmix.pipeline.views.figures import draw_figure, figure_png
from lsmix.pipeline.views.images import image_grid, png_bytes

__all__ = ["DRAWN_BY_FIGURE", "FOLDER", "main", "order_picture"]

FOLDER: Final = Path(__file__).resolve().parent / "pictures"
# File name -> (figure of lsmix, number of pairs).
DRAWN_BY_FIGURE: Final = {
    "one-mix.png": ("fig1", 3),
    "growing.png": ("fig4", 4),
    "zeros.png": ("fig3", 3),
    "methods.png": ("appendix-e", 4),
}
_FIRST: Final = (86, 98, 122)  # colour of the region that remains of x₁
_SECOND: Final = (255, 170, 60)  # colour of the region that x₂ replaces


def order_picture() -> bytes:
    """Return the regions that come from the second image at λ = 1/16, 3/16, …, 15/16, as PNG."""
    config = FlowConfig(height=32, width=32, channels=3, levels=3, steps=1, hidden=4)
    taken = [n * config.height * config.width * config.channels // 16 for n in range(1, 17, 2)]
    picture = image_grid(
        [[_painted(second_region(count, config)) for count in taken]],
        scale=3,
        gap=8,
        column_titles=[f"λ={n}/16" for n in range(1, 17, 2)],
        text_size=22,
    )
    return png_bytes(picture)


def _painted(second: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Draw a region, bool (H, W), in two colours with darker borders between its 8×8 cells, uint8 (H, W, 3)."""
    image = np.where(second[..., None], np.uint8(_SECOND), np.uint8(_FIRST))
    image[::8] = image[::8] // 4 * 3
    image[:, ::8] = image[:, ::8] // 4 * 3
    return image


def main(workspace: Path | str = "runs") -> None:
    """Write all images."""
    FOLDER.mkdir(exist_ok=True)
    write_atomic(FOLDER / "order.png", order_picture())
    made = run(recipe_path("demo"), workspace=workspace, stage="encode", device="cpu")
    flow = load_flow(made["train-glow"].folder)
    latents, dataset = open_latents(made["encode"].folder), open_dataset(made["ingest"].folder)
    for name, (drawn, pairs) in DRAWN_BY_FIGURE.items():
        shown = draw_figure(drawn, flow, latents, dataset, pairs=pairs)
        write_atomic(FOLDER / name, figure_png(shown, width=560))  # narrow enough to read the titles on a phone
        sys.stdout.write(f"{name}: {shown.caption} {shown.decode_failed} of {shown.decoded} images failed to decode.\n")


if __name__ == "__main__":
    main(*sys.argv[1:2])
