"""What a step computes with: captions, tags, sizes, masks, pictures to change, and what caches stand for."""

from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines as tiny
import torch
from accelerate import Accelerator
from PIL import Image
from tiny_adapters import core, tiny_xl
from tiny_run import image_folder, tiny_config

from diffusion_unet.codec import LatentCodec
from diffusion_unet.conditioning import TextEncoder
from diffusion_unet.errors import InputError
from diffusion_unet.model import DiffusionModel
from diffusion_unet.schedule import NoiseSchedule
from training.batches import Batch, Batches, encode, told
from training.config import Config
from training.data import Dataset, inspect, open_data
from training.precompute import keep_latents, keep_texts
from training.start import shown

CPU = torch.device("cpu")


def latent_model(in_channels: int = 4) -> DiffusionModel:
    text = TextEncoder(tiny.tokenizer(), tiny.text_encoder())
    codec = LatentCodec(tiny.vae())
    return DiffusionModel(core(tiny.SD | {"in_channels": in_channels}), NoiseSchedule.scaled_linear(), text, codec)


def looked(config: Config) -> Dataset:
    return inspect(open_data(config.data, 3), config.data, 3)


def batches(tmp_path: Path, model: DiffusionModel, *overrides: str, **more: Any) -> Batches:
    folder = image_folder(tmp_path / "images")
    config = tiny_config(tmp_path / "run", folder, "--data.caption_dropout=0", *overrides, train_batch_size=8)
    return Batches(config, looked(config), model, **more)


@pytest.fixture
def wordy(tmp_path: Path) -> Path:
    folder = tmp_path / "wordy"
    folder.mkdir()
    Image.new("RGB", (9, 9), "red").save(folder / "a.png")
    (folder / "a.txt").write_text("first, second, third , fourth,, fifth")
    return folder


def test_tags_are_shuffled_behind_those_that_are_kept(wordy: Path, tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path / "run", wordy, "--data.shuffle_tags=true", "--data.keep_tags=2", "--data.caption_dropout=0.25"
    )
    made = Batches(config, looked(config), latent_model())
    draws = made.plan.draw(range(400))
    captions = made._captions(draws.samples.tolist(), draws)
    dropped = [caption for caption in captions if not caption]
    kept = [caption.split(", ") for caption in captions if caption]
    assert 70 < len(dropped) < 130
    assert all(tags[:2] == ["first", "second"] and sorted(tags[2:]) == ["fifth", "fourth", "third"] for tags in kept)
    assert len({tuple(tags) for tags in kept}) == 6
    again = made.plan.draw(range(100, 200))
    assert made._captions(again.samples.tolist(), again) == captions[100:200]


def test_sizes_are_those_of_the_picture_and_its_crop(tmp_path: Path) -> None:
    model = tiny_xl()
    made = batches(tmp_path, model, "--data.resolution=8", "--data.random_flip=true")
    batch = made.assemble(3)
    draws = made.plan.draw(batch.indices)
    assert batch.time_ids is not None and batch.images is not None
    for row, sample, mirrored, image in zip(
        batch.time_ids.tolist(), draws.samples.tolist(), draws.flip.tolist(), batch.images, strict=True
    ):
        height, width, top, left, *target = (int(value) for value in row)
        assert (width, height) == made.dataset.sizes[sample] == (14, 10) and target == [8, 8]
        whole = made.dataset.image(sample)[:, ::-1] if mirrored else made.dataset.image(sample)
        assert (image.numpy() == whole[top : top + 8, left : left + 8]).all()


def test_an_inpainting_model_sees_the_mask_and_what_it_leaves(tmp_path: Path) -> None:
    model = latent_model(9)
    made = batches(tmp_path, model, "--model.task=inpaint", "--data.resolution=16", "--data.random_flip=true")
    drawn = [made.assemble(step) for step in range(12)]
    masks = torch.cat([batch.masks for batch in drawn if batch.masks is not None])
    assert masks.shape == (96, 1, 16, 16) and masks.flatten(1).any(1).all()
    whole = int(masks.flatten(1).all(1).sum())
    assert 10 < whole < 40  # a quarter, and rectangles that happen to be whole
    for mask in masks[:, 0]:
        down, right = mask.any(1).nonzero(), mask.any(0).nonzero()
        assert bool(mask[down.min() : down.max() + 1, right.min() : right.max() + 1].all())
    batch = drawn[0]
    assert batch.images is not None and batch.masks is not None
    extra = told(batch, model, CPU)["extra"]
    factor = model.codec.scale_factor
    assert extra.shape == (8, 5, 16 // factor, 16 // factor)
    assert torch.equal(extra[:, :1], batch.masks[:, :, ::factor, ::factor].float())
    grey = torch.where(batch.masks.movedim(1, -1), 128, batch.images)
    assert isinstance(model.codec, LatentCodec)
    torch.testing.assert_close(extra[:, 1:], model.codec.encode(grey.to(torch.uint8), batch.masked_noise))


def test_a_picture_to_be_changed_is_cut_as_what_it_becomes(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images")
    rows = [f'{{"file_name": "{i}.png", "before": "{i}.png", "text": "change it"}}' for i in range(12)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    model = latent_model(8)
    config = tiny_config(
        tmp_path / "run",
        folder,
        "--model.task=instruct-pix2pix",
        "--data.original_image_column=before",
        "--data.resolution=16",
        "--data.caption_dropout=0.4",
        train_batch_size=64,
    )
    made = Batches(config, looked(config), model)
    batch = made.assemble(0)
    assert batch.originals is not None and batch.images is not None and batch.seen is not None and batch.ids is not None
    assert torch.equal(batch.originals, batch.images)
    empty = torch.tensor([row.equal(made.model.text.tokenize([""])[0][0]) for row in batch.ids])  # type: ignore[union-attr]
    drop = made.plan.draw(batch.indices).drop
    assert torch.equal(empty, drop < 0.4) and torch.equal(~batch.seen, (drop >= 0.2) & (drop < 0.6))
    extra = told(batch, model, CPU)["extra"]
    assert not extra[~batch.seen].any() and extra[batch.seen].flatten(1).any(1).all()
    x = batch.originals.movedim(-1, 1).float() / 127.5 - 1
    expected = tiny.vae().eval().encode(x).latent_dist.mode()
    torch.testing.assert_close(extra[batch.seen], expected[batch.seen], rtol=1e-4, atol=1e-5)


def test_prior_preservation_weighs_the_two_halves(tmp_path: Path) -> None:
    others = image_folder(tmp_path / "others", 5)
    made = batches(
        tmp_path,
        latent_model(),
        "--data.instance_prompt=a sks dog",
        f"--data.class_data_dir={others}",
        "--data.class_prompt=a dog",
        "--data.prior_loss_weight=0.5",
        "--data.resolution=16",
    )
    batch = made.assemble(1)
    assert made.model.text is not None and batch.ids is not None
    mine, other = made.model.text.tokenize(["a sks dog", "a dog"])[0]
    assert batch.weight.tolist() == [2.0, 1.0] * 4
    assert all(torch.equal(row, (mine, other)[place % 2]) for place, row in enumerate(batch.ids))


@pytest.mark.parametrize("crops", [("--data.center_crop=true",), ("--data.cache_crops=3",)], ids=["centre", "three"])
def test_kept_latents_are_those_of_the_pixels(tmp_path: Path, crops: tuple[str, ...]) -> None:
    model = latent_model()
    extra = ("--data.cache_latents=true", "--data.random_flip=true", "--data.resolution=16", *crops)
    made = batches(tmp_path, model, *extra)
    keep_latents(made, Accelerator(cpu=True), shown("", False))
    assert made.latents is not None and len(made.latents) == 12 * 2 * made.config.data.cache_crops
    seen = set()
    for step in range(9):
        batch = made.assemble(step)
        assert batch.images is None and batch.moments is not None
        draws = made.plan.draw(batch.indices)
        places, numbers = made.kept_crops(draws.samples.tolist(), draws)
        seen |= set(numbers)
        pixels = made.dataset.images(draws.samples.tolist(), places, draws.flip)
        whole = Batch(batch.indices, batch.noise, batch.sigma, batch.weight, pixels, latent_noise=batch.latent_noise)
        torch.testing.assert_close(encode(batch, model, CPU), encode(whole, model, CPU), rtol=1e-4, atol=1e-5)
    assert seen == set(range(made.config.data.cache_crops))


def test_kept_texts_are_those_of_the_encoder(tmp_path: Path) -> None:
    model = tiny_xl()
    frozen = ("--data.cache_text=true", "--model.train_text_encoder=false", "--data.caption_dropout=0.5")
    plain, made = batches(tmp_path, model), batches(tmp_path, model, *frozen)
    keep_texts(made, Accelerator(cpu=True), shown("", False))
    batch = made.assemble(2)
    assert batch.ids is None and batch.context is not None and batch.pooled is not None and model.text is not None
    draws = made.plan.draw(batch.indices)
    captions = made._captions(draws.samples.tolist(), draws)
    assert "" in captions and len(set(captions)) > 2
    with torch.no_grad():
        expected = model.text(model.text.tokenize(captions)[0])
    torch.testing.assert_close(batch.context, expected.context, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(batch.pooled, expected.pooled, rtol=1e-4, atol=1e-5)
    assert plain.assemble(2).ids is not None


def test_the_offset_is_the_same_in_all_of_an_image(tmp_path: Path) -> None:
    model = latent_model()
    plain, offset = (
        batches(tmp_path, model, "--data.resolution=16", *more).assemble(1)
        for more in ((), ("--objective.noise_offset=0.1",))
    )
    added = (offset.noise - plain.noise) / 0.1
    assert torch.allclose(added, added[:, :, :1, :1], atol=1e-5)
    assert added[:, :, 0, 0].unique().numel() == 8 * 4 and 0.5 < float(added[:, :, 0, 0].std()) < 1.6


def test_what_is_looked_at_is_from_all_over_a_sorted_collection(tmp_path: Path) -> None:
    for name in ("ant", "zebra"):
        image_folder(tmp_path / "sorted" / name, 30)
        (tmp_path / "sorted" / name / "metadata.jsonl").unlink()
    config = tiny_config(tmp_path / "run", tmp_path / "sorted", "--data.held_out=20", "--data.resolution=16")
    made = Batches(config, looked(config), latent_model())
    assert made.model.text is not None
    ant = made.model.text.tokenize(["ant"])[0][0]
    for some in (made.held_out_batches(10), made.training_batches(10)):
        count = sum(int((batch.ids == ant).all(dim=1).sum()) for batch in some if batch.ids is not None)
        assert sum(len(batch.indices) for batch in some) == 10 and 2 <= count <= 8


def test_latents_over_another_background_are_others(tmp_path: Path) -> None:
    folder = tmp_path / "clear"
    folder.mkdir()
    for number in range(3):
        Image.new("RGBA", (16, 16), (9, 9, 9, 80 * number)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("something")
    model, stores = latent_model(), []
    for colour in ("white", "black"):
        config = tiny_config(
            tmp_path / colour,
            folder,
            "--data.cache_latents=true",
            "--data.look=quick",
            "--data.center_crop=true",
            "--data.resolution=16",
            f"--data.background={colour}",
            f"--data.cache_dir={tmp_path / 'cache'}",
        )
        made = Batches(config, looked(config), model)
        keep_latents(made, Accelerator(cpu=True), shown("", False))
        stores.append(made.latents)
    assert stores[0] is not None and stores[1] is not None and stores[0].path != stores[1].path


def test_some_instances_and_all_of_their_class(tmp_path: Path) -> None:
    others = image_folder(tmp_path / "others", 5)
    prior = (f"--data.class_data_dir={others}", "--data.class_prompt=a dog", "--data.instance_prompt=a sks dog")
    made = batches(tmp_path, latent_model(), *prior, "--data.max_train_samples=4", "--data.resolution=16")
    assert made.dataset.instances == 4 and len(made.dataset) == 9 and len(made.plan.classes) == 5
    for path in others.glob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"data\.class_data_dir: no image of .* can be used"):
        batches(tmp_path, latent_model(), *prior, "--data.resolution=16")
