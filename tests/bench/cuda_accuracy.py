# SPDX-License-Identifier: MIT
"""torch's own errors: 50 Euler steps of a random SiT-XL/2 at several precisions against float32, as tests/cuda/test_accuracy.c does with sitd.

Normal weights and biases of std 0.02, official position table's scale; then adaLN weights 15 times larger, as trained gates are.
"""
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


def sample(net, dtype, autocast=None):
    torch.manual_seed(7)
    x, y = torch.randn(IMAGES, 4, 32, 32, device="cuda"), torch.arange(IMAGES, device="cuda") * 207
    net = net.to(dtype)
    with torch.no_grad(), torch.autocast("cuda", autocast or torch.bfloat16, enabled=autocast is not None):
        for i in range(STEPS):
            t = torch.full((IMAGES,), i / STEPS, device="cuda")
            x = x + net(x.to(dtype), t.to(dtype), y)[:, :4].float() / STEPS
    return x


def main():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(1)
    net = module["Net"](32, 4, 2, 1152, 28, 16, 1001).cuda().eval()
    for p in net.parameters():
        p.data.normal_(0, 0.02)
    net.pos.data = positions(16, 1152).cuda()
    for gates in 1, 15:
        for name, p in net.named_parameters():
            if "mod." in name:
                p.data *= gates
        state = {k: v.clone() for k, v in net.state_dict().items()}
        exact = sample(net, torch.float32)
        for label, dtype, autocast in ("autocast bf16", torch.float32, torch.bfloat16), ("all bf16", torch.bfloat16, None), ("all f16", torch.float16, None):
            error = (sample(net, dtype, autocast) - exact).norm() / exact.norm()
            print(f"torch {torch.__version__}, adaLN x {gates}, {label}: relative L2 {error:.3g}", flush=True)
            net = net.float()
            net.load_state_dict(state)


main()
