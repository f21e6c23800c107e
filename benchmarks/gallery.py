"""The pictures of the gallery: one or a few of every shipped config, small, as the README shows them.

`python -m benchmarks.gallery [CONFIG…] [--runs FOLDER] [--pictures FOLDER]` draws those of the named configs
(`patch-ioi`), of all where none is named. Pictures are made from the tables of a complete run of the config in the
folder, the newest one; where there is none, the config is run first, which takes from seconds to minutes. So after a
change of the charts everything is drawn anew in a minute, and nothing is computed again.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.small_png import shrunk, size
from mechinterp_cli.config.yaml_reader import parse
from mechinterp_cli.errors import MechinterpError, UserError
from mechinterp_cli.report.shapes import Picture
from mechinterp_cli.report.view import read_view
from mechinterp_cli.runs.atomic import write_bytes
from mechinterp_cli.runs.reading import is_run, read_manifest

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
PICTURES = ROOT / "docs" / "figures"
WIDTH = 900
"""Pixels; wider charts keep one pixel per unit, so that their letters can be read."""
MAX_SCALE = 2.0

FIGURES: Mapping[str, Sequence[str]] = {
    "ablate-text": ["positions-4"],
    "ablate-toy": ["00-head-mean-repeated_loss", "positions"],
    "ablate-shortcut": ["contrasts"],
    "attribute-direct": ["direct"],
    "attribute-estimators": ["verified-logit_diff"],
    "attribute-ioi": ["verified-logit_diff", "01-z-atp-logit_diff"],
    "attribute-lens": ["lens"],
    "attribute-relp": ["verified-logit_diff"],
    "attribute-tokens": ["spans-logit_diff", "tokens-logit_diff"],
    "attribute-tokens-corrupt": ["spans-logit_diff", "tokens-logit_diff"],
    "attribute-toy": ["verified-logit_diff"],
    "circuit-greater-than": ["faithfulness-logit_diff"],
    "circuit-ioi": ["faithfulness-logit_diff", "graph-eap_ig_inputs"],
    "circuit-neurons-toy": ["faithfulness-logit_diff", "graph-eap_ig_inputs"],
    "circuit-planted": ["graph-exact", "faithfulness-logit_diff"],
    "heads-ioi": ["scores-direct_effect", "attention-direct_effect"],
    "heads-smollm2": ["scores-induction", "causal"],
    "heads-toy": ["training", "causal"],
    "patch-facts-tracing": ["00-resid_post-prob", "01-attn_out-prob", "02-mlp_out-prob"],
    "patch-induction-toy": ["01-z-logit_diff", "00-resid_pre-logit_diff"],
    "patch-paths-toy": ["01-path-logit_diff", "00-path-logit_diff"],
    "probe-toy": ["map-z"],
}
"""Config to those of its figures that tell its story, the best first; of other configs the first figure is shown."""


def configs() -> list[str]:
    """Every shipped config's name, in order."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def files(config: str) -> dict[str, str | None]:
    """File name of each of a config's pictures to the figure that it shows: None is a run's first one."""
    figures = FIGURES.get(config)
    if figures is None:
        return {f"{config}.png": None}
    first, *others = figures
    return {f"{config}.png": first, **{f"{config}-{_short(figure)}.png": figure for figure in others}}


def _short(figure: str) -> str:
    """A figure's name without its number, which says nothing where the others are not shown."""
    number, _, rest = figure.partition("-")
    return rest if number.isdigit() else figure


def small(picture: Picture) -> bytes:
    """A figure as a small PNG: at most `WIDTH` wide where its letters stay readable."""
    width, _ = size(picture.png(scale=1.0))
    return shrunk(picture.png(scale=min(MAX_SCALE, max(1.0, WIDTH / width))))


def drawn(config: str, run: Path) -> dict[str, bytes]:
    """A config's pictures by file name, from a run's tables.

    Raises:
        MechinterpError: The run cannot be read, or has no such figure.
    """
    _, view, _ = read_view(run)
    pictures = dict(view.pictures)
    wanted = {name: next(iter(pictures)) if figure is None else figure for name, figure in files(config).items()}
    if unknown := sorted(set(wanted.values()) - set(pictures)):
        cause = f"{run.name} has no figure {unknown[0]}; there are {', '.join(pictures)}"
        raise UserError(cause, "Change FIGURES in benchmarks/gallery.py.")
    return {name: small(pictures[figure]) for name, figure in wanted.items()}


def found(config: str, folder: Path) -> Path | None:
    """The newest complete run of a config in a folder; formats of its output may differ, nothing else."""
    wanted = _asked((CONFIGS / f"{config}.yaml").read_text())
    for path in sorted((path for path in folder.glob(f"*-{config}-*") if is_run(path)), reverse=True):
        manifest = read_manifest(path)
        changed = [text for text in manifest.overrides if not text.startswith("output.")]
        if manifest.status == "complete" and not changed and _asked((path / "config.yaml").read_text()) == wanted:
            return path
    return None


def _asked(text: str) -> dict[str, Any]:
    """What a config asks for, comments and output aside."""
    document: dict[str, Any] = parse(text, "config").value
    return {key: value for key, value in document.items() if key != "output"}


def run(config: str, folder: Path) -> Path:
    """Run a config in a process of its own, which gives its memory back.

    Raises:
        CalledProcessError: It failed; it has said why.
    """
    method = config.split("-")[0]
    command = [sys.executable, "-m", "mechinterp_cli", method, str(CONFIGS / f"{config}.yaml"), "--out", str(folder)]
    done = subprocess.run([*command, "--quiet"], check=True, stdout=subprocess.PIPE, text=True)
    return Path(done.stdout.removesuffix("\n"))


def strangers(folder: Path) -> Iterator[Path]:
    """Pictures in a folder that are of no config."""
    known = {name for config in configs() for name in files(config)}
    yield from (path for path in sorted(folder.glob("*.png")) if path.name not in known)


def draw(config: str, runs: Path, pictures: Path) -> None:
    """Draw a config's pictures, running it first where there is no run of it."""
    path = found(config, runs) or run(config, runs)
    for name, png in drawn(config, path).items():
        write_bytes(pictures / name, png)
        width, height = size(png)
        print(f"{name}: {width} × {height}, {len(png) / 1000:.0f} kB, of {path.name}", flush=True)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gallery", description=__doc__)
    add = parser.add_argument
    add("configs", nargs="*", metavar="CONFIG", help="patch-ioi, …; all if none is named")
    add("--runs", type=Path, default=ROOT / "runs" / "gallery", help="where runs are found and made")
    add("--pictures", type=Path, default=PICTURES, help="where pictures go")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.configs) - set(configs())):
        parser.error(f"no config is called {unknown[0]}; there are {', '.join(configs())}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw what is asked for; pictures of no config are removed."""
    options = parsed(arguments)
    for folder in (options.runs, options.pictures):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        for config in options.configs or configs():
            draw(config, options.runs, options.pictures)
    except (MechinterpError, subprocess.CalledProcessError) as error:
        print(f"{config}: {error}", file=sys.stderr)
        return 1
    for path in strangers(options.pictures):
        path.unlink()
        print(f"{path.name}: removed, as it is of no config")
    return 0


if __name__ == "__main__":
    sys.exit(main())
