"""A picture's loss: formulas, how a batch is cut, who shares a forward, and what is random."""

from __future__ import annotations

import pytest
import torch

import lorakit
from lorakit.core.spec import LoRASpec
from lorakit.data import split
from lorakit.errors import BaseError, DataError, SpecError
from lorakit.images.data import PictureSettings, PicturesPlan, load_pictures
from lorakit.images.noise import NoiseModel, generator_of
from lorakit.images.pictures import PicturesSpec
from lorakit.images.targets import picture_targets
from lorakit.images.task import PICTURES
from lorakit.layers.dropout import token_keys
from lorakit.tasks.task import Stretch
from tests.images import tiny
from tests.images.conftest import loaded
from tests.models import randomize


@pytest.fixture(scope="module")
def base():
    return loaded("sd")


@pytest.fixture(scope="module")
def exact():
    """The same in float64, where sums in another order differ by nothing that matters."""
    return loaded("sd", dtype="float64")


@pytest.fixture
def folder(tmp_path):
    return tiny.pictures(tmp_path / "data")


def data_of(base, folder, *, prior=None, masks=False, **settings):
    plan = PicturesPlan(
        PicturesSpec(str(folder), masks=masks),
        16,
        PictureSettings(**settings),
        None if prior is None else PicturesSpec(str(prior), masks=masks),
    )
    return load_pictures(plan, base)


@pytest.fixture
def attached(base):
    """Two adapters that change something, on a base for one test."""
    made = []

    def attach(words="attention", names=("a", "b"), base=base, **spec):
        text = spec.pop("text", False)
        spec = LoRASpec(rank=2, targets=picture_targets(base, words, text=text), **spec)
        handle = lorakit.attach(base.model, spec, names[0], trainable=True)
        made.append(handle)
        for name in names[1:]:
            handle.add(spec, name, trainable=True)
        randomize(handle)
        return handle, PICTURES.on(base.model, handle)

    yield attach
    for handle in made:
        handle.detach()


def gradient(handle, name, losses):
    for parameter in handle.parameters(name):
        parameter.grad = None
    losses.sum().backward()
    return torch.cat([p.grad.reshape(-1).clone() for p in handle.parameters(name)])


def off(first, second):
    """Their difference beside their length."""
    return ((first - second).norm() / first.norm()).item()


def test_the_loss_is_that_of_the_definition(base, folder, attached):
    """One picture by hand: the draw of the VAE, DDPM's noise, the UNet of diffusers."""
    handle, task = attached()
    data = data_of(base, folder)
    found = task.losses([Stretch([data[2]], "a", seed=5, step=7)]).item()
    key = token_keys(5, 7, torch.tensor([2]), torch.tensor([0])).item()
    generator = generator_of("train", key)
    torch.rand(1, generator=generator)
    stored = data[2].latent()
    latent = stored["mean"] + stored["std"] * torch.randn(4, 8, 8, generator=generator)
    noised = NoiseModel(base.pipe.scheduler).apply(latent, generator)
    text = base.pipe.encode_prompt("a green thing", "cpu", 1, False)[0]
    with handle.use("a"), torch.no_grad():
        predicted = base.pipe.unet(noised.input[None], noised.time, text)[0]
    expected = ((predicted[0] - noised.target) ** 2).mean().item()
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("text", [False, True])
def test_cutting_a_batch_changes_nothing(exact, folder, attached, text):
    """Pictures of two sizes, in one stretch or in several, with dropout that is keyed."""
    base = exact
    handle, task = attached("conv", names=("a",), base=base, text=text, dropout=0.2)
    data = data_of(base, folder, caption_dropout=0.5, min_snr=5.0, train_text=text)
    rows = [data[i] for i in (3, 0, 1, 5)]
    for module in base.model.modules():  # dropout acts in training alone
        module.training = False
    for path in handle.snapshot("a").low_rank:
        base.model.get_submodule(path).training = True
    whole = task.losses([Stretch(rows, "a", 1, 4, True)])
    first = gradient(handle, "a", whole)
    parts = [task.losses([Stretch(rows[i : i + 2], "a", 1, 4, True)]) for i in (0, 2)]
    second = gradient(handle, "a", torch.cat(parts))
    base.model.eval()
    assert off(whole, torch.cat(parts).sum()) < 1e-9
    assert off(first, second) < 1e-9
    other = task.losses([Stretch(rows, "a", 1, 5, True)])
    assert abs(other.item() - whole.item()) > 1e-2
    assert off(first, gradient(handle, "a", other)) > 1e-2


def test_runs_that_share_a_forward_are_as_if_alone(exact, folder, attached):
    handle, task = attached("all-linear", base=exact)
    data = data_of(exact, folder)
    mine, theirs = Stretch([data[0], data[3]], "a", 1, 0), Stretch([data[1], data[2]], "b", 2, 9)
    alone = task.losses([mine])
    solo = gradient(handle, "a", alone)
    both = task.losses([mine, theirs])
    shared = gradient(handle, "a", both)
    assert off(both[0], alone[0]) < 1e-9
    assert off(shared, solo) < 1e-9
    bare = task.losses([Stretch(mine.examples, None, 1, 0)])
    assert abs(bare.item() - alone.item()) > 1e-3


def test_activations_made_again_give_the_same_gradient(base, folder, attached):
    handle, task = attached(names=("a",))
    data = data_of(base, folder)
    stretch = Stretch([data[0], data[3]], "a", 1, 0)
    plain = gradient(handle, "a", task.losses([stretch]))
    again = PICTURES.on(base.model, handle, "layers")
    try:
        torch.testing.assert_close(gradient(handle, "a", again.losses([stretch])), plain)
    finally:
        base.denoiser.disable_gradient_checkpointing()
    with pytest.raises(BaseError, match="can make whole blocks again"):
        PICTURES.on(base.model, handle, "mlp")


def test_an_evaluation_is_always_the_same(base, folder, attached):
    _, task = attached(names=("a",))
    data = data_of(base, folder)
    first = task.measured([data[0], data[3], data[1]], "a").sums
    alone = torch.cat([task.measured([data[i]], "a").sums for i in (0, 3, 1)])
    torch.testing.assert_close(first, alone, rtol=1e-5, atol=1e-6)
    weighed = data_of(base, folder, min_snr=1.0, caption_dropout=0.9, noise_offset=0.3)
    other = task.measured([weighed[0], weighed[3], weighed[1]], "a").sums
    torch.testing.assert_close(first, other, rtol=1e-5, atol=1e-6)  # settings are of training


def test_masks_count_what_they_show(base, folder, attached, tmp_path):
    """Ones everywhere are no mask; half of a picture is the mean over that half."""
    from PIL import Image

    _, task = attached(names=("a",))
    plain = task.losses([Stretch([data_of(base, folder)[0]], "a")])
    Image.new("L", (24, 24), 255).save(folder / "00.mask.png")
    ones = data_of(base, folder, masks=True)
    torch.testing.assert_close(task.losses([Stretch([ones[0]], "a")]), plain)
    half = Image.new("L", (24, 24), 0)
    half.paste(255, (0, 0, 12, 24))
    half.save(folder / "00.mask.png")
    data = data_of(base, folder, masks=True)
    assert "of 1 of 6 pictures only what the masks show is learnt" in data.report.pictures.notes
    mask = data[0].latent()["mask"]
    assert mask.shape == (1, 8, 8)
    assert mask[0, 0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    found = task.losses([Stretch([data[0]], "a")])
    assert abs(found.item() - plain.item()) > 1e-4
    clear = Image.new("RGBA", (24, 24), (255, 255, 255, 0))
    clear.paste((255, 255, 255, 255), (0, 0, 12, 24))
    clear.save(folder / "00.mask.png")
    torch.testing.assert_close(data_of(base, folder, masks=True)[0].latent()["mask"], mask)
    prior = tiny.pictures(tmp_path / "class", 1)
    half.save(prior / "00.mask.png")
    of_class = data_of(base, folder, prior=prior, masks=True)[-1]
    assert of_class.is_prior
    torch.testing.assert_close(of_class.latent()["mask"], mask)
    (folder / "00.mask.png").unlink()
    with pytest.raises(DataError, match="no picture has one"):
        data_of(base, folder, masks=True)


def test_pictures_of_a_class_that_is_to_stay(base, folder, attached, tmp_path):
    _, task = attached(names=("a",))
    prior = tiny.pictures(tmp_path / "class", 8)
    data = data_of(base, folder, prior=prior, prior_weight=0.25)
    plain = data_of(base, folder, prior=prior)
    assert len(data) == 16  # six pictures, some of them twice, and eight of the class
    assert [data[i].is_prior for i in (0, 7, 8, 15)] == [False, False, True, True]
    assert data[6].picture == data[0].picture
    _, held = split(data, 0.2, 0)
    assert len(held) > 0
    assert not any(data[int(i)].is_prior for i in held)
    weighed = task.losses([Stretch([data[9]], "a")])
    torch.testing.assert_close(weighed, 0.25 * task.losses([Stretch([plain[9]], "a")]))
    torch.testing.assert_close(
        task.losses([Stretch([data[1]], "a")]), task.losses([Stretch([plain[1]], "a")])
    )
    with pytest.raises(SpecError, match="no pictures of a class"):
        data_of(base, folder, prior_weight=0.5)


def test_captions_are_dropped_in_their_share(base, folder, attached):
    _, task = attached(names=("a",))
    data = data_of(base, folder, caption_dropout=0.3)
    captions = [task._drawn(data[0], "a", key).caption for key in range(300)]
    assert 60 < captions.count("") < 120  # 90, σ = 8


def test_pictures_are_mirrored_in_half_of_their_steps(base, folder, attached):
    """With the noise that they have unmirrored; an evaluation never looks at them so."""
    _, task = attached(names=("a",))
    plain, flipped = data_of(base, folder), data_of(base, folder, flip=True)
    rows = [task._drawn(flipped[0], "a", key) for key in range(300)]
    mirrored = [key for key, row in enumerate(rows) if row.example.placed.flipped]
    assert 120 < len(mirrored) < 180  # 150, σ = 9
    for key in (mirrored[0], next(key for key in range(300) if key not in mirrored)):
        noise = rows[key].noised
        assert noise.time == task._drawn(plain[0], "a", key).noised.time
        same = torch.equal(noise.input, task._drawn(plain[0], "a", key).noised.input)
        assert same == (key not in mirrored)
    assert task.measured([flipped[0]], "a").sums == task.measured([plain[0]], "a").sums


def test_settings_that_cannot_act(folder):
    flow = loaded("sd3")
    with pytest.raises(SpecError, match=r"min_snr: this base learns flows(.|\n)*noise_offset"):
        data_of(flow, folder, min_snr=5.0, noise_offset=0.1)
    with pytest.raises(SpecError, match=r"min_snr is -1(.|\n)*caption_dropout is 1"):
        PictureSettings(min_snr=-1, caption_dropout=1)
