"""Imported once by the process that tests fork others from, see `tests.helpers.forks`; it must not start a thread."""

import gc

import pytest  # noqa: F401 - what follows is imported for those to be forked
import torch
import torch._dynamo  # optimizers and DDP import it, which takes seconds
import torch.utils.tensorboard
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer  # noqa: F401

import opensora.acceleration.native
import opensora.generation.run
import opensora.training.diffusion.trainer
import opensora.training.vae.trainer  # noqa: F401

torch.set_num_threads(1)
gc.collect()
gc.freeze()  # children that look for garbage do not copy all of it
