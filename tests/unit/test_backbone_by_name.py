"""An open_clip model by name with local weights, as where there is no network; prompts on it."""

from __future__ import annotations

from pathlib import Path

import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file

from diki_ray.clip.backbone import load
from diki_ray.learning.methods import Diki


def test_a_named_model_with_a_local_file_of_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-S-32-alt", pretrained=None)
    path = tmp_path / "weights.safetensors"
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    backbone = load("ViT-S-32-alt", str(path))
    assert backbone.name == f"ViT-S-32-alt/{path}"
    image = backbone.preprocess(Image.new("RGB", (300, 200), "red"))[None]
    tokens = backbone.tokenize(["guinea_pig", "cat"], "a photo of a {}.")
    with torch.no_grad():
        model.eval()
        torch.testing.assert_close(backbone.encode_image(image), model.encode_image(image, normalize=True))
        torch.testing.assert_close(
            backbone.encode_text(tokens), model.encode_text(tokens, normalize=True), atol=1e-5, rtol=0
        )
    method = Diki(backbone, 8, 8, 8, 8)
    parameters = method.initial(torch.Generator().manual_seed(0))
    assert method.image_features(image, parameters).shape == (1, backbone.embed_dim)


def test_the_digest_is_of_the_weights_and_not_of_the_process(tmp_path: Path) -> None:
    embedded, again = load("embedded"), load("embedded")
    assert embedded.digest() == again.digest()
    with torch.no_grad():
        again.model.logit_scale += 1e-3
    assert embedded.digest() != again.digest()
