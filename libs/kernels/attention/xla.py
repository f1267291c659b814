"""Attention for XLA devices in plain torch: a loop over blocks of queries, each against every key, recomputed backward.

Static shapes: documents are numbers of tokens, never boundaries. Half of its products are masked away; the kernel that
skips them is `pallas`. Also what that kernel is compared with at lengths where `reference` has no memory.
"""
# B sequences  S query tokens  T key tokens  q queries of a block  H query heads  G key heads  h = H/G  D head width

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as nnF

from libs.kernels.chunk_loop import Driver, Tensors, chunk_loop, row_parts

# Scores of one block of queries, all heads and the rows of one chip: 512 MiB in fp32.
BLOCK_SCORES = 2**27


def default_block(B: int, H: int, T: int) -> int:
    """Queries of one block, a power of two in [16, 1024] that keeps the scores near BLOCK_SCORES."""
    return max(16, min(1024, 1 << (max(BLOCK_SCORES // (B * H * T), 1).bit_length() - 1)))


def attention_xla(
    q_BSHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, ids_BS: Tensor | None, causal: bool, scale: float, *,
    driver: Driver = "scan", block: int | None = None,
) -> Tensor:  # fmt: skip
    """Same arguments and result as `api.attention`, already checked; ids_BS are `document_ids`, with S == T."""
    dtype, packed = q_BSHD.dtype, ids_BS is not None
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    B, S, H, D = q_BSHD.shape
    T, G = k_BTGD.shape[1:3]
    block = min(default_block(-(-B // row_parts(driver)), H, T) if block is None else block, S)
    missing = -S % block
    device = q_BSHD.device

    def rows(u_Bq: Tensor) -> Tensor:
        """(B,G,x). With an axis for every one of the scores: the mask, once widened, would be written to memory."""
        return torch.cat([u_Bq] * (H // G), dim=1)[:, None].expand(-1, G, -1)

    def blocks(u_BS: Tensor) -> Tensor:
        return u_BS.view(u_BS.shape[0], -1, block, *u_BS.shape[2:]).transpose(0, 1)

    # Queries beyond the end attend to something and are dropped.
    queries = blocks(nnF.pad(q_BSHD.view(B, S, G, H // G, D), (0, 0, 0, 0, 0, 0, 0, missing)))
    positions = (torch.arange(S + missing, device=device) + (T - S)).view(-1, 1, block)
    # In the accumulation dtype, so that their gradients add up in it; the values are as given.
    constants: Tensors = (k_BTGD.to(acc).transpose(1, 2), v_BTGD.to(acc).transpose(1, 2))
    xs: Tensors = (queries, positions)
    if ids_BS is not None:
        constants = (*constants, ids_BS)
        xs = (*xs, blocks(torch.cat([ids_BS, ids_BS[:, -1:].expand(-1, missing)], dim=1)))

    # Autograd keeps the body until the graph is gone, so it may close over no tensor.
    def body(constants: Tensors, carry: Tensors, x: Tensors) -> tuple[Tensors, Tensors]:
        k_BGTD, v_BGTD = constants[:2]
        # The heads of a group are rows (x = h*q) of one product: keys and values are not copied for each.
        scores_BGxT = x[0].permute(0, 2, 3, 1, 4).to(acc).flatten(2, 3) @ k_BGTD.transpose(2, 3) * scale
        visible = None
        if causal:
            keys_BGT = torch.arange(T, device=device).expand(*scores_BGxT.shape[:2], T)
            visible = keys_BGT[:, :, None] <= rows(x[1].expand(scores_BGxT.shape[0], block))[..., None]
        if packed:
            same = rows(x[2])[..., None] == constants[2][:, None, None].expand(-1, G, 1, T)
            visible = same if visible is None else visible & same
        if visible is not None:
            scores_BGxT = torch.where(visible, scores_BGxT, -torch.inf)
        out_BGxD = scores_BGxT.softmax(-1).to(dtype).to(acc) @ v_BGTD
        return carry, (out_BGxD.view(*out_BGxD.shape[:2], H // G, block, D).permute(0, 3, 1, 2, 4).flatten(2, 3),)

    _, (out,) = chunk_loop(body, constants, (), xs, driver)
    return out.transpose(0, 1).flatten(1, 2)[:, :S].to(q_BSHD.dtype)
