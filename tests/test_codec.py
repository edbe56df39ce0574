"""Codecs against their closed form, and against diffusers' image processor and autoencoder."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor

from diffusion_unet.codec import LatentCodec, PixelCodec
from diffusion_unet.errors import InputError, NonFiniteError


def vae(**options: object) -> AutoencoderKL:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, **blocks, **options).eval()


def pictures(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.5), (-0.4, 0.7), (0.31, 1.3)])
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_return_exactly(channels: int, mean: float, std: float) -> None:
    codec = PixelCodec(channels, mean, std)
    images = pictures(2, 256, 5, channels)
    images[0, :, 0, 0] = torch.arange(256)
    x = codec.encode(images)
    assert x.dtype == torch.float32 and x.shape == (2, channels, 256, 5)
    exact = (images.double().numpy().transpose(0, 3, 1, 2) / 127.5 - 1 - mean) / std
    assert np.abs(x.numpy() - exact).max() < 1e-6
    back = codec.decode(x)
    assert back.dtype == torch.uint8 and torch.equal(back, images) and back.is_contiguous()
    assert codec.scale_factor == 1 and codec.to("cpu") is codec


def test_pixels_are_rounded_and_clamped() -> None:
    codec = PixelCodec(1, 0.0, 1.0)
    values = torch.tensor([-9.0, -1.0, 9.49 / 127.5 - 1, 9.51 / 127.5 - 1, 1.0, 9.0])
    assert codec.decode(values.view(1, 1, 1, -1)).flatten().tolist() == [0, 0, 9, 10, 255, 255]
    half = codec.decode(torch.full((1, 1, 2, 2), 0.5, dtype=torch.bfloat16))
    assert half.unique().tolist() == [191]
    for bad in (float("nan"), float("inf")):
        with pytest.raises(NonFiniteError, match="NaN or infinity"):
            codec.decode(torch.full((1, 1, 2, 2), bad))


def test_pixel_settings_and_pictures_that_cannot_be() -> None:
    for channels, mean, std in ((4, 0.0, 1.0), (1, float("nan"), 1.0), (1, 0.0, 0.0), (3, 0.0, -1.0)):
        with pytest.raises(InputError):
            PixelCodec(channels, mean, std)
    for images in (torch.zeros(1, 4, 4, 1), pictures(4, 4, 1), pictures(1, 4, 4, 3)):
        with pytest.raises(InputError, match=r"uint8 \[B, H, W, 1\]"):
            PixelCodec(1).encode(images)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scaling_factor": 1.5, "shift_factor": 0.1},
        {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [2.0] * 4},
    ],
)
def test_latents_are_those_of_diffusers(options: dict[str, object]) -> None:
    stock = vae(**options)
    codec = LatentCodec(stock)
    images = pictures(2, 16, 24, 3)
    assert codec.scale_factor == 2 and codec.channels == 3 and codec.latent_channels == 4
    processor = VaeImageProcessor(vae_scale_factor=2)
    with torch.no_grad():
        moments = stock.encode(processor.preprocess(images.numpy().astype(np.float32) / 255)).latent_dist
        noise = torch.randn(moments.mean.shape)
        for given, z in ((None, moments.mode()), (noise, moments.mean + moments.std * noise)):
            if "latents_mean" in options:
                mean = torch.tensor(options["latents_mean"]).view(1, 4, 1, 1)
                expected = (z - mean) / 2.0 * stock.config.scaling_factor
            else:
                expected = (z - (stock.config.shift_factor or 0)) * stock.config.scaling_factor
            assert torch.allclose(codec.encode(images, given), expected, atol=1e-5)
        decoded = processor.postprocess(stock.decode(z).sample, output_type="np")
    got = codec.decode(expected).numpy()
    assert got.dtype == np.uint8 and np.abs(got / 255 - decoded).max() <= 0.51 / 255


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_moments_are_kept_and_sampled_later(dtype: torch.dtype) -> None:
    stock = vae(scaling_factor=1.5, shift_factor=0.1)
    with torch.no_grad():  # an untrained one has no log-variance that is cut off
        stock.quant_conv.weight[4:] *= 300
    stock.to(dtype)
    codec = LatentCodec(stock)
    images = pictures(3, 16, 24, 3)
    images[1, 4:12, 8:20] = 127  # grey where it is to be painted
    with torch.no_grad():
        x = (images.movedim(-1, 1).float() / 127.5 - 1).to(dtype)
        given = [stock.encode(x[row : row + 1]).latent_dist for row in range(3)]
    mean, std = (torch.cat([getattr(one, name) for one in given]).float() for name in ("mean", "std"))
    moments = codec.moments(images)
    assert moments.dtype == torch.float32 and moments.shape == (3, 8, 8, 12) and not moments.requires_grad
    assert torch.equal(moments, torch.cat([torch.cat([one.mean, one.logvar], 1) for one in given]).float())
    assert torch.equal(moments[1:2], codec.moments(images[1:2]))  # whatever stands beside it
    assert moments[:, 4:].min() == -30 and moments[:, 4:].max() == 20  # far beyond in the encoder's last layer
    noise = torch.randn(3, 4, 8, 12)
    for row, x in ((None, mean), (noise, mean + std * noise)):
        latents = codec.sample(moments, row)
        assert latents.dtype == torch.float32 and torch.equal(latents, (x - 0.1) * 1.5)
        assert torch.equal(latents, codec.encode(images, row))
    for bad in (pictures(1, 7, 8, 3), pictures(1, 8, 8, 1)):
        with pytest.raises(InputError):
            codec.moments(bad)


def test_latent_codec_is_saved_and_loaded(tmp_path: Path) -> None:
    codec = LatentCodec(vae(scaling_factor=0.5))
    codec.save(tmp_path / "vae")
    loaded = LatentCodec.load(tmp_path / "vae")
    stock, report = AutoencoderKL.from_pretrained(tmp_path / "vae", low_cpu_mem_usage=False, output_loading_info=True)
    assert not any(report.values()) and stock.config.scaling_factor == 0.5
    images = pictures(1, 8, 8, 3)
    latents = codec.encode(images)
    assert torch.allclose(loaded.encode(images), latents, atol=1e-5)
    again = LatentCodec(stock).decode(latents).int()
    assert (again - codec.decode(latents).int()).abs().max() <= 1
    codec.save(tmp_path / "half", variant="fp16", dtype=torch.bfloat16)
    half = LatentCodec.load(tmp_path / "half", variant="fp16", dtype=torch.bfloat16)
    assert {p.dtype for p in half.vae.parameters()} == {torch.bfloat16}
    difference = half.decode(latents).float() - codec.decode(latents).float()
    assert difference.abs().mean() < 2
    assert half.to(dtype=torch.float32) is half and half.vae.dtype == torch.float32


def test_latent_codecs_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="multiples of 2"):
        LatentCodec(vae()).encode(pictures(1, 7, 8, 3))
    with pytest.raises(InputError, match="3 \\(RGB\\)"):
        LatentCodec(vae(in_channels=1))
    large = LatentCodec(vae())
    next(large.vae.parameters()).fill_(1e30)
    with pytest.raises(InputError, match=r"the autoencoder: encoder\S* does not fit in torch.float16"):
        large.save(tmp_path / "half", dtype=torch.float16)
    assert not (tmp_path / "half").exists()
    LatentCodec(vae()).save(tmp_path)
    weights, config = tmp_path / "diffusion_pytorch_model.safetensors", tmp_path / "config.json"
    whole, text = weights.read_bytes(), config.read_text()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=str(tmp_path)) as caught:
        LatentCodec.load(tmp_path)
    assert "\n" not in str(caught.value)
    weights.write_bytes(whole)
    for old, new in (('"AutoencoderKL"', '"os.system"'), ('"layers_per_block": 1', '"layers_per_block": 2')):
        assert old in text
        config.write_text(text.replace(old, new))
        with pytest.raises(InputError, match=str(tmp_path)) as caught:
            LatentCodec.load(tmp_path)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"config\.json"):
        LatentCodec.load(tmp_path / "none")


# ---- tiles ----

TILE = 16  # pixels, 8 latents: neighbours share 2 of these


def tiled_stock() -> AutoencoderKL:
    """Diffusers' own, with the same tiles."""
    stock = vae()
    stock.tile_sample_min_size, stock.tile_latent_min_size, stock.tile_overlap_factor = TILE, TILE // 2, 0.25
    return stock


def tiled(codec: LatentCodec, z: torch.Tensor, tile: int = TILE) -> torch.Tensor:
    """Before it is rounded to bytes."""
    with torch.no_grad():
        return codec._in_parts(lambda part: codec.vae.decode(part).sample, z, tile, made=2)


def test_a_picture_of_one_tile_is_the_same_to_the_bit() -> None:
    codec = LatentCodec(vae())
    latents = torch.randn(3, 4, 8, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(codec.decode(latents, tile=TILE), codec.decode(latents))
    images = pictures(3, 16, 12, 3)
    assert torch.equal(codec.moments(images, tile=TILE), codec.moments(images))
    assert torch.equal(codec.encode(images, tile=TILE), codec.encode(images))


def row_by_row(stock: AutoencoderKL, z: torch.Tensor) -> torch.Tensor:
    """Diffusers' tiles and blends, but whole rows of tiles are blended before they are blended with one another.

    Its own order gives the upper left one of four tiles that meet more weight than the others."""
    strips = []
    for top in range(0, z.shape[2], 6):
        tiles = [stock.decode(z[:, :, top : top + 8, left : left + 8]).sample for left in range(0, z.shape[3], 6)]
        for one, next_one in itertools.pairwise(tiles):
            stock.blend_h(one, next_one, 4)
        strips.append(torch.cat([tile[..., :12] for tile in tiles], dim=-1))
    for one, next_one in itertools.pairwise(strips):
        stock.blend_v(one, next_one, 4)
    return torch.cat([strip[:, :, :12] for strip in strips], dim=2)


@pytest.mark.parametrize("shape", [(6, 18), (18, 6), (5, 12), (18, 18)])
def test_tiles_are_those_of_diffusers(shape: tuple[int, int]) -> None:
    """At sizes where it makes no tile that lies within another one."""
    stock = tiled_stock()
    codec = LatentCodec(stock)
    z = torch.randn(2, 4, *shape, generator=torch.Generator().manual_seed(0))
    images = pictures(1, 2 * shape[0], 2 * shape[1], 3)
    ours = tiled(codec, z)
    with torch.no_grad():
        expected = row_by_row(stock, z) if min(shape) > 8 else stock.tiled_decode(z).sample
        moments = stock._tiled_encode(images.movedim(-1, 1).float() / 127.5 - 1)
    assert ours.shape == (2, 3, 2 * shape[0], 2 * shape[1])
    assert torch.allclose(ours, expected, atol=1e-5)
    if min(shape) <= 8:
        assert torch.allclose(codec.moments(images, tile=TILE), moments, atol=1e-5)


def test_tiles_leave_no_seam_and_take_no_more_memory_than_a_tile() -> None:
    codec = LatentCodec(vae())
    z = torch.randn(2, 4, 24, 39, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = codec.vae.decode(z).sample
        beside = torch.cat([codec.vae.decode(part).sample for part in z.split(16, dim=-1)], dim=-1)  # without overlap
    shapes: list[torch.Size] = []
    hook = codec.vae.decoder.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape))
    ours = tiled(codec, z, 32)
    hook.remove()
    assert {shape[0] for shape in shapes} == {1} and max(max(shape[2:]) for shape in shapes) == 16

    def steps(fault: torch.Tensor) -> torch.Tensor:
        """[W - 1]: how far it changes from each column to the next."""
        return fault.diff(dim=-1).abs().mean(dim=(0, 1, 2))

    natural = steps(whole).mean()
    assert steps(beside - whole)[[31, 63]].min() > natural  # a seam: as much as the picture itself changes there
    assert steps(ours - whole).max() < 0.6 * natural
    assert (ours - whole).abs().mean() < 0.3 * whole.std()


def test_tiles_that_cannot_be() -> None:
    codec = LatentCodec(vae())
    for tile in (0, -16, 4, 12, 16.0, True):
        with pytest.raises(InputError, match="a multiple of 8 pixels"):
            codec.decode(torch.zeros(1, 4, 8, 8), tile=tile)  # type: ignore[arg-type]
