"""Feature networks from files: Inception-v3, DINOv2, and any network of yours as TorchScript.

Nothing is downloaded, and no file is read that could run Python code of its own.
"""

from __future__ import annotations

import hashlib
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from reference_model.features import FeatureNetwork, FileFeatures, as_rgb, weights_digest
from reference_model.protocol import parse_features

Shape = tuple[int, int, int]
Device: TypeAlias = str | torch.device

DINOV2_SIZE = 224
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def load_features(spec: str, image_shape: Shape, device: Device = "cpu") -> FeatureNetwork:
    """Load a feature network.

    Args:
        spec: `inception:FILE`, `dinov2:FOLDER` or `torchscript:FILE`.
        image_shape: Channels, height and width of the images to come.
        device: Where to compute.

    Returns:
        The network, ready to describe images of that shape.

    Raises:
        ValueError: If there is nothing at the path, it is something else, a library is missing
            that it needs, or the network does not take such images.
    """
    kind, name = parse_features(spec)
    if kind not in LOADERS:
        raise ValueError(f"the feature network {kind!r} does not come from a file")
    path = Path(name).expanduser()
    if not path.exists():
        raise ValueError(
            f"{path} does not exist, so {kind} features have no weights; give the path of a file "
            "or folder that you have: nothing is downloaded"
        )
    return LOADERS[kind](path, image_shape, device)


def torchscript_features(path: Path, image_shape: Shape, device: Device) -> FeatureNetwork:
    """Load a network of yours, which `torch.jit.save` wrote.

    It gets images as the data set has them, uint8 `[N, C, H, W]`, and returns `[N, dim]`.
    """
    module = _open_torchscript(path, device)
    return FileFeatures("torchscript", _digest(path), module, image_shape, str(path), device)


def inception_features(path: Path, image_shape: Shape, device: Device) -> FeatureNetwork:
    """Load the Inception-v3 of the FID's protocol: the 2048 features before its last layer.

    Resizing to 299 pixels, as TensorFlow 1 did it, is part of what is loaded.

    Args:
        path: The network as TorchScript (StyleGAN's `inception-2015-12-05.pt`), which needs
            nothing else, or its weights alone (`pt_inception-2015-12-05-6726825d.pth`), which
            need the library torch-fidelity. Both hold the weights of Heusel et al. 2017.
        image_shape: Channels, height and width of the images to come; grey ones become RGB.
        device: Where to compute.
    """
    extract: Callable[[Tensor], Any]
    if _is_torchscript(path):
        module = _open_torchscript(path, device)
        if "return_features" in str(module.forward.schema):

            def extract(images: Tensor) -> Any:
                return module(as_rgb(images), return_features=True)
        else:

            def extract(images: Tensor) -> Any:
                return module(as_rgb(images))
    else:
        module = _inception_from_weights(path).to(device)

        def extract(images: Tensor) -> Any:
            return module(as_rgb(images))[0]

    return FileFeatures("inception", _digest(path), extract, image_shape, str(path), device)


def dinov2_features(path: Path, image_shape: Shape, device: Device) -> FeatureNetwork:
    """Load DINOv2 from a folder as Hugging Face has it: the class token after the last norm.

    Images are resized to 224 pixels (bicubic, antialiased), and normalised as ImageNet's.

    Args:
        path: Folder with `config.json` and the weights, such as that of `facebook/dinov2-large`
            (ViT-L/14, 1024 features), which FD-DINOv2 takes.
        image_shape: Channels, height and width of the images to come; grey ones become RGB.
        device: Where to compute.

    Source:
        Stein et al. 2023, arXiv:2306.04675; Karras et al. 2024, arXiv:2312.02696, App. C.
    """
    try:
        from transformers import AutoConfig, Dinov2Model
    except ImportError as error:
        raise ValueError("DINOv2 features need transformers: pip install transformers") from error
    try:
        kind = AutoConfig.from_pretrained(path, local_files_only=True).model_type
        if kind != "dinov2":  # weights that do not fit would be left random
            raise ValueError(f"its model_type is {kind!r}")
        model, found = Dinov2Model.from_pretrained(
            path, local_files_only=True, output_loading_info=True
        )
        if found["missing_keys"]:
            raise ValueError(f"weights are missing: {', '.join(sorted(found['missing_keys']))}")
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} holds no DINOv2 that transformers can load: {reason}") from error
    model = model.eval().to(device)
    digest = weights_digest(model.state_dict().items())
    positions = model.embeddings.position_embeddings
    positions.data = _original_positions(positions.data, DINOV2_SIZE // model.config.patch_size)
    mean, std = (
        torch.tensor(values, device=device).reshape(3, 1, 1)
        for values in (IMAGENET_MEAN, IMAGENET_STD)
    )

    def extract(images: Tensor) -> Tensor:
        x = as_rgb(images).float() / 255
        x = F.interpolate(x, (DINOV2_SIZE, DINOV2_SIZE), mode="bicubic", antialias=True)
        return model((x - mean) / std).last_hidden_state[:, 0]

    return FileFeatures("dinov2", digest, extract, image_shape, str(path), device)


LOADERS: dict[str, Callable[[Path, Shape, Device], FeatureNetwork]] = {
    "dinov2": dinov2_features,
    "inception": inception_features,
    "torchscript": torchscript_features,
}


def _original_positions(positions: Tensor, patches: int) -> Tensor:
    """Position embeddings of an image of `patches`², as DINOv2's own repository resamples them.

    It adds 0.1 to the number of patches, which shifts the sampling points; transformers does not,
    and its features, and so the distances, differ from those that are published.
    """
    side = round((positions.shape[1] - 1) ** 0.5)
    if side == patches:
        return positions
    grid = positions[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    scale = (patches + 0.1) / side
    resampled = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([positions[:, :1], resampled.flatten(2).transpose(1, 2)], dim=1)


def _inception_from_weights(path: Path) -> Any:
    """Put weights into the architecture that torch-fidelity has."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old pickles, which the error below names
            torch.load(path, map_location="cpu", weights_only=True)  # torch-fidelity does not check
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} holds neither TorchScript nor weights; a pickle with code of its own, as "
            "NVIDIA's inception-v3-2015-12-05.pkl, is not opened: take inception-2015-12-05.pt or "
            "pt_inception-2015-12-05-6726825d.pth"
        ) from error
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import (  # type: ignore[import-not-found]
            FeatureExtractorInceptionV3,
        )
    except ImportError as error:
        raise ValueError(
            f"{path} holds weights without the network; pip install torch-fidelity, which has "
            "it, or give the TorchScript file inception-2015-12-05.pt, which needs nothing"
        ) from error
    try:
        return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(path)).eval()
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{path} holds other weights than the FID's Inception: {reason}"
        ) from error


def _is_torchscript(path: Path) -> bool:
    """Whether a file is a ZIP with code in it; `torch.save` writes one without."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def _open_torchscript(path: Path, device: Device) -> Any:
    if path.is_file() and _is_torchscript(path):
        return torch.jit.load(str(path), map_location=device).eval()
    raise ValueError(
        f"{path} is not TorchScript; write one by torch.jit.save(torch.jit.script(network), path)"
    )


def _digest(path: Path) -> str:
    """Twelve hexadecimal digits that change with a file's content."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha.update(chunk)
    return sha.hexdigest()[:12]
