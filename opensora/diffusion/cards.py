"""GPUs that people have, and how long they take for arithmetic and for moving bytes.

Rates are the makers' (dense, 16 bits, sums in 32); what programs reach of them is calibrated on one H100, where it was
measured (torch 2.11, cuDNN 9.19): a forward of the 11B model took 0.369 s at 256px and 8.91 s at 768px.
"""

import re
from dataclasses import dataclass

CONTEXT = 0.5 * 2**30  # bytes that the driver and torch's kernels take of a card
# shares of the peak rates that were reached on an H100
MATRIX_SHARE, ATTENTION_SHARE, COPY_SHARE = 0.78, 0.61, 0.85
PASSES = 8.5  # over a block's activations by what is neither product nor attention: norms, gates, rotations, GELU
CONVOLUTION_SHARE, TRAFFIC_SHARE = 0.60, 0.077  # of autoencoders: 0.86 s for 256px (with torch's own GroupNorm)
LINK_SHARE = 0.85
TEXT_SECONDS = 0.9  # prompts of a first sample, of which the arithmetic is a hundredth


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        name: as people call it.
        tflops: 10^12 operations per second of matrix products in 16 bits.
        gib: memory that its driver shows, in GiB.
        bandwidth: of that memory, in 10^9 bytes per second.
        link: to the machine's memory, in 10^9 bytes per second and direction.
        dtype: the 16-bit type that it computes in.
        known_as: what its driver's name holds.
    """

    name: str
    tflops: float
    gib: float
    bandwidth: float
    link: float
    dtype: str = "bf16"
    known_as: str = ""

    @property
    def room(self) -> int:
        """Bytes that a run may use."""
        return int(self.gib * 2**30 - CONTEXT)

    def forward_seconds(self, linear: float, attention: float, activations: float) -> float:
        """Of a forward of a diffusion model.

        Args:
            linear: operations of matrix products.
            attention: operations of attention.
            activations: bytes of all blocks' activations.
        """
        products = (linear / MATRIX_SHARE + attention / ATTENTION_SHARE) / self.tflops / 1e12
        return products + PASSES * activations / COPY_SHARE / self.bandwidth / 1e9

    def network_seconds(self, flops: float, written: float) -> float:
        """Of a convolutional network.

        Args:
            flops: its operations.
            written: bytes of what its layers give.
        """
        return flops / CONVOLUTION_SHARE / self.tflops / 1e12 + 2 * written / TRAFFIC_SHARE / self.bandwidth / 1e9

    def copy_seconds(self, count: float) -> float:
        """Of bringing bytes from the machine's pinned memory."""
        return count / LINK_SHARE / self.link / 1e9


CARDS = (
    Card("H200", 989, 140.4, 4800, 64, known_as="H200"),
    Card("H100 80GB", 989, 79.6, 3350, 64, known_as="H100"),
    Card("A100 80GB", 312, 80.0, 2039, 32, known_as="A100"),
    Card("L40S 48GB", 362, 45.0, 864, 32, known_as="L40S"),
    Card("RTX 5090 32GB", 210, 31.8, 1792, 64, known_as="RTX 5090"),
    Card("RTX 4090 24GB", 165, 24.0, 1008, 32, known_as="RTX 4090"),
    Card("RTX 3090 24GB", 71, 24.0, 936, 32, known_as="RTX 3090"),
    Card("RTX 4080 16GB", 98, 16.0, 717, 32, known_as="RTX 4080"),
    Card("RTX 3060 12GB", 26, 12.0, 360, 32, known_as="RTX 3060"),
    Card("T4 16GB", 65, 15.0, 320, 16, dtype="fp16", known_as="T4"),
)


def known_card(name: str) -> Card | None:
    """The card that a driver calls ``name``, None if the table does not have it."""
    words = re.split(r"[\s-]+", name)
    return next((card for card in CARDS if all(word in words for word in card.known_as.split())), None)
