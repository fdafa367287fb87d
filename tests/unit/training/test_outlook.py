"""What a dry run of training says: recipes fit their cards, and estimates are near what was measured."""

import pytest

from opensora.config import parse_config
from opensora.config.commands import TrainOptions
from opensora.diffusion.cards import CARDS
from opensora.models.autoencoder import Autoencoder
from opensora.training.diffusion.outlook import outlook_of, report

CARD = {card.name: card for card in CARDS}
EIGHTY = ("80gb/stage1", "80gb/stage1_i2v", "80gb/stage2", "80gb/high_compression")


@pytest.fixture(autouse=True, scope="module")
def counted_once():
    """What encoding takes is counted once for each shape: it takes long, and the recipes share shapes."""
    known, count = {}, Autoencoder.encode_cost

    def encode_cost(self, size, dtype):
        key = repr((type(self), self.config, self.tiling, size, dtype))
        if key not in known:
            known[key] = count(self, size, dtype)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Autoencoder, "encode_cost", encode_cost)
        yield


def outlook(name, *words):
    return outlook_of(parse_config([f"configs/diffusion/train/{name}.py", *words], TrainOptions))


@pytest.mark.parametrize("name", EIGHTY)
def test_recipes_for_eight_cards_of_80_gb(name):
    found = outlook(name)
    assert found.ranks == 8
    assert found.peak(found.most) < CARD["H100 80GB"].room


def test_lora_fits_a_card_of_24_gb():
    found = outlook("lora_11b")
    assert found.peak(found.most) < CARD["RTX 4090 24GB"].room - 4 * 2**30
    assert found.parts["encoders"] == 0
    integers = outlook("lora_11b", "--model.quantize", "int8")
    assert 3 * 2**30 < integers.peak(integers.most) - found.peak(found.most) < 4.5 * 2**30
    assert integers.peak(integers.most) < CARD["RTX 4090 24GB"].room
    assert outlook("lora_11b", "--weights-memory", "8GB").parts["weights"] < 8.2e9
    text = report(found)
    assert "weights 10.5" in text
    assert "RTX 4090 24GB  yes" in text


def test_all_weights_fit_a_card_of_80_gb():
    """With fp32 weights and moments in host memory; not without."""
    found = outlook("full_11b_1x80gb")
    assert found.peak(found.most) < CARD["H100 80GB"].room - 8 * 2**30
    assert found.parts["masters"] == found.parts["states"] == 0
    assert sum(found.host.values()) == pytest.approx(72e9, rel=0.02)
    assert "of the host, for each device: states 22.5, masters 44.3" in report(found)
    small = ["--bucket_config", "{'256px': {129: (1.0, 2)}}"]
    smaller = outlook("full_11b_1x80gb", *small)
    assert smaller.peak(smaller.most) < CARD["L40S 48GB"].room
    on_card = outlook("full_11b_1x80gb", *small, "--optim.states", "device")
    assert on_card.peak(on_card.most) > CARD["H100 80GB"].room
    kept = outlook("full_11b_1x80gb", *small, "--optim.in_backward", "False")
    assert kept.parts["gradients"] == pytest.approx(47.6e9, rel=0.01)
    exact = outlook("full_11b_1x80gb", "--optim.cls", "AdamW")
    assert exact.host["states"] - found.host["states"] == pytest.approx(71e9, rel=0.02)


def test_lora_takes_what_an_h100_took():
    """Rank 16 on all linear layers of the blocks, in fp32, 129 frames: 27.5 GiB and 1.84 s."""
    layers = "['q_proj','k_proj','v_proj','proj','v_mlp','linear2','img_mlp.0','img_mlp.2','txt_mlp.0','txt_mlp.2']"
    words = ["--lora_config", f"{{'r': 16, 'target_modules': {layers}}}", "--lora-dtype", "fp32", "--model.quantize"]
    found = outlook("lora_11b", *words, "none", "--accumulation-steps", "1", "--ema-decay", "none")
    assert found.peak(found.most) / 2**30 == pytest.approx(27.5, rel=0.05)
    assert found.seconds(found.longest, CARD["H100 80GB"]) == pytest.approx(1.84, rel=0.1)
