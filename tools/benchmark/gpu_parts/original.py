"""Times one forward of Open-Sora 2.0's own MMDiT: ``PYTHONPATH=CHECKOUT python original.py SIZES_AS_JSON``.

Knows nothing of this project, since the package that it imports has the same name.
"""

import dataclasses
import json
import statistics
import sys
import time

import torch


def main() -> None:
    """Build, run, print seconds and GiB as JSON."""
    from opensora.models.mmdit.model import MMDiTConfig, MMDiTModel

    given = json.loads(sys.argv[1])
    device, dtype = torch.device(given["device"]), getattr(torch, given["dtype"])
    frames, rows, columns = given["latent"]
    tokens, hidden = frames * rows * columns // 4, given["hidden"]
    keys = dict(
        from_pretrained=None, cache_dir=None, in_channels=64, vec_in_dim=768, context_in_dim=4096, hidden_size=hidden,
        mlp_ratio=4.0, num_heads=hidden // 128, depth=given["depth"], depth_single_blocks=given["depth_single"],
        axes_dim=[16, 56, 56], theta=10_000, qkv_bias=True, guidance_embed=False, cond_embed=True, fused_qkv=False,
        grad_ckpt_settings=None, use_liger_rope=True, patch_size=2,
    )  # fmt: skip
    known = {field.name for field in dataclasses.fields(MMDiTConfig)}
    config = MMDiTConfig(**{key: value for key, value in keys.items() if key in known})
    with torch.device("meta"):
        model = MMDiTModel(config).to(dtype)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.02)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, device=device, dtype=dtype)

    inputs = {
        "img": drawn(tokens, 64),
        "img_ids": torch.zeros(1, tokens, 3, device=device, dtype=dtype),
        "txt": drawn(given["text"], 4096),
        "txt_ids": torch.zeros(1, given["text"], 3, device=device, dtype=dtype),
        "timesteps": torch.full((1,), 0.7, device=device, dtype=dtype),
        "y_vec": drawn(768),
        "cond": drawn(tokens, 68),
    }
    times = []
    with torch.no_grad():
        for _ in range(4):
            start = time.perf_counter()
            model(**inputs)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    print(json.dumps({"median_s": statistics.median(times[1:]), "peak_gib": peak}))


if __name__ == "__main__":
    main()
