# SPDX-License-Identifier: MIT
"""torch's own errors: 50 Euler steps of a random SiT-XL/2 and of the bundled model at several precisions against float32, as tests/cuda/test_accuracy.c does with sitd.

XL/2: normal weights and biases of std 0.02, official position table's scale; then adaLN weights 15 times larger, as trained gates are.
"""
import json
import os

import torch

here = os.path.dirname(os.path.abspath(__file__))
module = {"__name__": "torch_forward"}
exec(compile(open(os.path.join(here, "torch_forward.py")).read().replace("\nmain()\n", "\n"), "torch_forward.py", "exec"), module)
IMAGES, STEPS = 4, 50


def positions(side, width):
    omega = 1 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    column, row = (torch.arange(side * side) % side)[:, None] * omega, (torch.arange(side * side) // side)[:, None] * omega
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], 1)[None].float()


def sample(net, dtype, classes, autocast=None):
    torch.manual_seed(7)
    channels = net.out // 2
    x, y = torch.randn(IMAGES, channels, 32, 32, device="cuda"), torch.arange(IMAGES, device="cuda") * 207 % classes
    net = net.to(dtype)
    with torch.no_grad(), torch.autocast("cuda", autocast or torch.bfloat16, enabled=autocast is not None):
        for i in range(STEPS):
            t = torch.full((IMAGES,), i / STEPS, device="cuda")
            x = x + net(x.to(dtype), t.to(dtype), y)[:, :channels].float() / STEPS
    return x


def errors(label, net, classes):
    """prints the error of each of torch's ways; net is float32 and on the GPU"""
    state = {k: v.clone() for k, v in net.state_dict().items()}
    exact = sample(net, torch.float32, classes)
    for way, dtype, autocast in ("autocast bf16", torch.float32, torch.bfloat16), ("all bf16", torch.bfloat16, None), ("all f16", torch.float16, None):
        error = (sample(net, dtype, classes, autocast) - exact).norm() / exact.norm()
        print(f"torch {torch.__version__}, {label}, {way}: relative L2 {error:.3g}", flush=True)
        net = net.float()
        net.load_state_dict(state)


def random_xl():
    torch.manual_seed(1)
    net = module["Net"](32, 4, 2, 1152, 28, 16, 1001).cuda().eval()
    for p in net.parameters():
        p.data.normal_(0, 0.02)
    net.pos.data = positions(16, 1152).cuda()
    for gates in 1, 15:
        for name, p in net.named_parameters():
            if "mod." in name:
                p.data *= gates
        errors(f"XL/2, adaLN x {gates}", net, 1000)


def bundled(folder):
    from safetensors.torch import load_file

    a = json.load(open(f"{folder}/model.json"))
    arch = a["architecture"]
    side = arch["input_size"] // arch["patch_size"]
    net = module["Net"](arch["input_size"], arch["in_channels"], arch["patch_size"], arch["hidden_size"], arch["depth"], arch["num_heads"], arch["num_classes"])
    names = [("x_embedder.proj.", "embed."), ("t_embedder.mlp.", "time."), ("y_embedder.embedding_table.", "label."), ("final_layer.adaLN_modulation.1.", "mod."),
             ("final_layer.linear.", "last."), ("attn.", ""), ("mlp.", ""), ("adaLN_modulation.1.", "mod.")]
    state = {"freq": net.freq}
    for key, value in load_file(f"{folder}/{a['weights']['file']}").items():
        for old, new in names:
            if old in key:
                key = key.replace(old, new)
                break
        state["pos" if key == "pos_embed" else key] = value.float()
    state.setdefault("pos", positions(side, arch["hidden_size"]))
    net.load_state_dict(state)
    errors("fashion-sit", net.cuda().eval(), arch["num_classes"])


def main():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    bundled(os.path.join(here, "../../deploy/models/fashion-sit"))
    random_xl()


main()
