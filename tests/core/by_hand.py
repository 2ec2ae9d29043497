"""The network written out once more, straight from the paper's equations and a state dict.

Plain arithmetic on whole tensors, float64, no code of the packages: what FIT is held against.
"""

import math

import torch


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(w, name, x):
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]


def ff(w, name, x):
    h = linear(w, f"{name}.fc1", norm(w, f"{name}.norm", x))
    return linear(w, f"{name}.fc2", h * (1 + torch.erf(h / math.sqrt(2))) / 2)


def attention(w, name, q_in, kv_in, head_dim, mask=None):
    q, k, v = (linear(w, f"{name}.{m}", x) for m, x in (("q", q_in), ("k", kv_in), ("v", kv_in)))
    heads = []
    for h in range(0, q.shape[-1], head_dim):
        part = slice(h, h + head_dim)
        scores = q[..., part] @ k[..., part].mT / math.sqrt(head_dim)
        if mask is not None:
            scores = scores.masked_fill(~mask[..., None, :], -math.inf)
        heads.append(scores.softmax(-1) @ v[..., part])
    return linear(w, f"{name}.o", torch.cat(heads, -1))


def cross(w, name, q_tokens, kv_tokens, head_dim, mask=None):
    q_in, kv_in = norm(w, f"{name}.q_norm", q_tokens), norm(w, f"{name}.kv_norm", kv_tokens)
    return q_tokens + attention(w, name, q_in, kv_in, head_dim, mask)


def scalar_token(w, name, s):
    features = w[f"{name}.fc1.weight"].shape[1]
    rates = [10_000 ** (-i / (features // 2)) for i in range(features // 2)]
    wave = torch.stack([f(s * r) for f in (torch.sin, torch.cos) for r in rates], -1)
    wave = wave - wave.mean(-1, keepdim=True)
    wave = wave / (wave.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    h = linear(w, f"{name}.fc1", wave)
    return linear(w, f"{name}.fc2", h / (1 + torch.exp(-h)))


def cut(video, config):
    """Patches by slicing: (B, G, N, C * p * p)."""
    (gt, gh, gw), p = config.group, config.patch
    T, H, W = video.shape[2:]
    return torch.stack(
        [
            torch.stack(
                [
                    video[:, :, t, y : y + p, x : x + p].flatten(1)
                    for t in range(t0, t0 + gt)
                    for y in range(y0, y0 + gh * p, p)
                    for x in range(x0, x0 + gw * p, p)
                ],
                1,
            )
            for t0 in range(0, T, gt)
            for y0 in range(0, H, gh * p)
            for x0 in range(0, W, gw * p)
        ],
        1,
    )


def fit(w, config, x, sigma, cond, previous):
    """F, as patch tokens (B, G, N, 48), and the final latents."""
    w = {name: value.double() for name, value in w.items()}
    x = x.double()
    if config.low_res:
        scale = config.height // config.low_res[0]
        frames = cond.low_res.double().transpose(1, 2).flatten(0, 1)
        big = torch.nn.Upsample(scale_factor=scale, mode="bilinear")(frames)
        x = torch.cat([x, big.unflatten(0, (len(x), -1)).transpose(1, 2)], 1)
    rows = config.padded_height - config.height
    x = torch.cat([x, x.new_zeros(*x.shape[:3], rows, x.shape[4])], 3)
    x = norm(w, "stem_norm", linear(w, "stem", cut(x, config))) + w["positions"]
    z = w["self_conditioning.latents"] + norm(
        w,
        "self_conditioning.norm",
        previous.double() + ff(w, "self_conditioning.ff", previous.double()),
    )
    scalars = {
        "sigma": sigma.double().log() / 4,
        "framerate": 1000 / cond.framerate.double(),
        "height": cond.resolution[:, 0].double().log2(),
        "width": cond.resolution[:, 1].double().log2(),
    }
    if config.low_res:
        scalars["augmentation"] = cond.augmentation.double()
    tokens = [scalar_token(w, f"conditioning.{name}", s)[:, None] for name, s in scalars.items()]
    c = torch.cat([*tokens, linear(w, "conditioning.text", cond.text.double())], 1)
    always = torch.ones(len(c), len(scalars), dtype=torch.bool)
    mask = torch.cat([always, cond.text_mask], 1)
    G, head = config.num_groups, config.patch_head_dim
    for b in range(config.blocks):
        at = f"blocks.{b}"
        z = cross(w, f"{at}.cond_read", z, c, head, mask)
        z = z + ff(w, f"{at}.cond_ff", z)
        z = cross(w, f"{at}.read", z.unflatten(1, (G, -1)), x, head).flatten(1, 2)
        z = z + ff(w, f"{at}.read_ff", z)
        for i in range(config.global_layers):
            layer = f"{at}.global_layers.{i}"
            z_in = norm(w, f"{layer}.0.norm", z)
            z = z + attention(w, f"{layer}.0", z_in, z_in, config.latent_head_dim)
            z = z + ff(w, f"{layer}.1", z)
        x = cross(w, f"{at}.write", x, z.unflatten(1, (G, -1)), head)
        x = x + ff(w, f"{at}.write_ff", x)
    return linear(w, "head", norm(w, "head_norm", x)), z
