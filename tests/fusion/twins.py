"""Copies of the structure of the public code's classes, written for these tests, with the public attribute names."""

import math

import torch
from torch import nn

F = nn.functional


# -- vision --------------------------------------------------------------------------------------------------------


class PreNorm(nn.Module):
    def __init__(self, dim, fn, eps=1e-5):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.fn = fn

    def forward(self, x, **kwargs):
        return self.fn(self.norm(x), **kwargs)


class Attention(nn.Module):
    def __init__(self, dim, heads=8, dim_head=64, dropout=0.0, bias=True):
        super().__init__()
        inner = heads * dim_head
        self.heads = heads
        self.scale = dim_head**-0.5
        self.attend = nn.Softmax(dim=-1)
        self.dropout = nn.Dropout(dropout)
        self.qkv = nn.Linear(dim, inner, bias=False)
        identity = heads == 1 and dim_head == dim
        self.to_out = nn.Identity() if identity else nn.Sequential(nn.Linear(inner, dim, bias), nn.Dropout(dropout))

    def forward(self, x, return_attention=False):
        w = self.qkv(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        attention = self.dropout(self.attend(torch.matmul(w, w.transpose(-1, -2)) * self.scale))
        if return_attention:
            return attention
        return self.to_out(torch.matmul(attention, w).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, dim, step_size=0.1, lambd=0.1):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, dim))
        nn.init.kaiming_uniform_(self.weight)
        self.step_size = step_size
        self.lambd = lambd

    def forward(self, x):
        reconstruction = F.linear(F.linear(x, self.weight), self.weight.t())
        gradient = self.step_size * (F.linear(x, self.weight.t()) - reconstruction) - self.step_size * self.lambd
        return F.relu(x + gradient)


class Transformer(nn.Module):
    def __init__(self, dim, depth, heads, dim_head, dropout=0.0, ista=0.1, lambd=0.1):
        super().__init__()
        self.heads, self.depth, self.dim = heads, depth, dim
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PreNorm(dim, Attention(dim, heads, dim_head, dropout)),
                    PreNorm(dim, FeedForward(dim, ista, lambd)),
                ]
            )
            for _ in range(depth)
        )

    def forward(self, x):
        for attn, ff in self.layers:
            x = ff(attn(x) + x)
        return x


class Vision(nn.Module):
    def __init__(self, dim=16, depth=2, heads=2, dim_head=6, patch_dim=12, classes=5, **options):
        super().__init__()
        self.embedding = nn.Sequential(nn.LayerNorm(patch_dim), nn.Linear(patch_dim, dim), nn.LayerNorm(dim))
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.transformer = Transformer(dim, depth, heads, dim_head, **options)
        self.mlp_head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, classes))

    def forward(self, patches):
        x = self.embedding(patches)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        return self.mlp_head(self.transformer(x)[:, 0])


# -- MAE -----------------------------------------------------------------------------------------------------------


class Dictionary(nn.Module):
    def __init__(self, dim, step_size=0.1):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, dim))
        nn.init.kaiming_uniform_(self.weight)
        self.step_size = step_size

    def forward(self, x):
        return F.linear(x, self.weight)


class DecoderTransformer(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        first, second = PreNorm(dim, Dictionary(dim)), PreNorm(dim, Attention(dim, heads, dim // heads))
        self.layers = nn.ModuleList([nn.ModuleList([first, second])])

    def forward(self, x):
        for ff, attn in self.layers:
            y = ff(x)
            x = y - attn(y)
        return x


class MAE(nn.Module):
    def __init__(self, dim=16, depth=2, heads=2):
        super().__init__()
        self.blocks = nn.ModuleList(Transformer(dim, 1, heads, dim // heads, lambd=0.5) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder_blocks = nn.ModuleList(DecoderTransformer(dim, heads) for _ in range(depth))
        self.decoder_pred = nn.Linear(dim, 12)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(x)


# -- alpha ---------------------------------------------------------------------------------------------------------


class OvercompleteISTABlock(nn.Module):
    def __init__(self, d, expansion=4, eta=0.1, lmbda=0.1, decoupled=True):
        super().__init__()
        self.eta = eta
        self.lmbda = lmbda
        self.D = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(d, expansion * d)))
        if decoupled:
            self.D1 = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(d, expansion * d)))

    def forward(self, x):
        a = torch.einsum("pd,nlp->nld", self.D, x)
        z = F.relu(self.eta * a - self.eta * self.lmbda)
        r = torch.einsum("pd,nlp->nld", self.D, torch.einsum("dp,nlp->nld", self.D, z))
        z = F.relu(z - self.eta * (r - a) - self.eta * self.lmbda)
        return torch.einsum("dp,nlp->nld", self.D1 if hasattr(self, "D1") else self.D, z)


class AlphaTransformer(nn.Module):
    def __init__(self, dim=16, depth=2, heads=2, decoupled=True):
        super().__init__()
        self.layers = nn.ModuleList([])
        for _ in range(depth):
            attention = PreNorm(dim, Attention(dim, heads, dim // heads, bias=False), eps=1e-6)
            coding = PreNorm(dim, OvercompleteISTABlock(dim, decoupled=decoupled), eps=1e-6)
            self.layers.append(nn.ModuleList([attention, coding]))

    def forward(self, x):
        for attn, ff in self.layers:
            x = attn(x) + x
            x = ff(x) + x
        return x


# -- GPT -----------------------------------------------------------------------------------------------------------


class LayerNorm(nn.Module):
    def __init__(self, width, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class CausalSelfAttention(nn.Module):
    def __init__(self, n_embd, n_head, block_size, dropout, bias, flash):
        super().__init__()
        self.c_attn = nn.Linear(n_embd, n_embd, bias=False)
        self.c_proj = nn.Linear(n_embd, n_embd, bias=bias)
        self.y_hook = nn.Identity()
        self.attn_dropout = nn.Dropout(dropout)
        self.resid_dropout = nn.Dropout(dropout)
        self.n_head, self.n_embd, self.dropout, self.flash = n_head, n_embd, dropout, flash
        if not flash:
            self.register_buffer("bias", torch.tril(torch.ones(block_size, block_size))[None, None])

    def forward(self, x, changed=None):
        B, T, C = x.shape
        w = self.c_attn(x)
        if changed is not None:
            w = changed(w)
        w = w.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        if self.flash:
            y = F.scaled_dot_product_attention(w, w, w, dropout_p=self.dropout if self.training else 0, is_causal=True)
        else:
            att = (w @ w.transpose(-2, -1)) * (1.0 / math.sqrt(w.size(-1)))
            att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
            y = self.attn_dropout(F.softmax(att, dim=-1)) @ w
        return self.resid_dropout(self.c_proj(self.y_hook(y.transpose(1, 2).contiguous().view(B, T, C))))


class MLP(nn.Module):
    def __init__(self, n_embd, expansion):
        super().__init__()
        self.weight = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(expansion * n_embd, n_embd)))
        self.relu = nn.ReLU()
        self.step_size = 0.1
        self.lambd = 0.1
        self.expansion = expansion

    def forward(self, x, changed=None):
        if self.expansion == 1:
            residual = x @ self.weight - x @ self.weight.T @ self.weight
            code = self.relu(x + self.step_size * residual - self.step_size * self.lambd)
            return code if changed is None else changed(code)
        a = F.linear(x, self.weight)
        z = F.relu(self.step_size * (a - self.lambd))
        z = self.relu(z + self.step_size * (a - F.linear(F.linear(z, self.weight.T), self.weight) - self.lambd))
        return F.linear(z if changed is None else changed(z), self.weight.T)


class GPTBlock(nn.Module):
    def __init__(self, n_embd=16, n_head=2, block_size=32, dropout=0.0, bias=True, flash=False, expansion=1, own=True):
        super().__init__()
        self.prenorm_1 = LayerNorm(n_embd, bias) if own else nn.LayerNorm(n_embd)
        self.attn = CausalSelfAttention(n_embd, n_head, block_size, dropout, bias, flash)
        self.prenorm_2 = LayerNorm(n_embd, bias) if own else nn.LayerNorm(n_embd)
        self.ista = MLP(n_embd, expansion)

    def forward(self, x, changed=None):
        if changed is not None:
            return self.ista(self.prenorm_2(x + self.attn(self.prenorm_1(x), changed)), changed)
        x = x + self.attn(self.prenorm_1(x))
        return self.ista(self.prenorm_2(x))


class GPT(nn.Module):
    def __init__(self, n_embd=16, vocabulary=11, depth=2, **options):
        super().__init__()
        self.wte = nn.Embedding(vocabulary, n_embd)
        self.h = nn.ModuleList(GPTBlock(n_embd, **options) for _ in range(depth))
        self.lm_head = nn.Linear(n_embd, vocabulary, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, tokens):
        x = self.wte(tokens) if not tokens.is_floating_point() else tokens
        for block in self.h:
            x = block(x)
        return self.lm_head(x)


CODE_BASES = {
    "vision": (Vision, 12),
    "mae": (MAE, 16),
    "alpha": (AlphaTransformer, 16),
    "language": (GPT, 16),
    "overcomplete-language": (lambda **options: GPT(expansion=4, flash=True, **options), 16),
}
"""The five public code bases: name -> (builder of the twin, width of the tokens that it takes)."""
