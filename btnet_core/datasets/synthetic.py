"""Synthetic faces: parametric people drawn on the fly, the embedded default data set (no download).

A face is drawn in its own frame: ``u`` to the right and ``v`` down, in pixels of the aligned 112x112 crop, origin
at (56, 64); eyes near (+-17.6, -12), nose tip (0, 8), mouth corners (+-14.5, 28). Each image maps its pixels back
to that frame through a small 3-D rotation with depth, so edges stay smooth at any pose. Shading follows the
normals of a height field; albedo comes from one texture per identity (pores, freckles, moles, wrinkles, beard).

Every parameter is a hash of (seed, identity, image, its place in the table below): an image depends on nothing
else, is the same in any batch and on any platform up to rounding. Who somebody is shows mostly in details of a
few pixels (irises, lids, brows, lips, marks); skin and hair are shared by many and change with light and habit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from btnet_core.errors import ConfigError

VERSION = 1  # of the renderer: part of every checksum; raise it whenever a pixel changes
SIDE = 112
BLOCK = 32  # images rendered together

# Each factor is uniform between the two numbers (pixels, unless it is a share or an angle in radians).
IDENTITY = {
    # coarse: shared by many
    "gender": (0, 1), "tone": (0, 1), "undertone": (-1, 1), "hair_hue": (0, 1), "hair_style": (0, 1),
    "width": (37, 41), "jaw": (1.75, 2.6), "chin": (42, 47), "hairline": (-50, -40), "part": (-14, 14),
    # fine: who it is
    "eye_x": (16.5, 18.9), "eye_y": (-13.2, -11.2), "eye_w": (7.2, 9.4), "eye_up": (2.8, 4.7), "eye_low": (1.5, 2.8),
    "tilt": (-0.10, 0.17), "crease": (1.2, 4.2), "bag": (0, 1), "lash": (0.6, 1.5), "iris_r": (3.2, 4.0),
    "iris_hue": (0, 1), "iris_light": (0, 1), "brow_y": (-24, -19.5), "brow_arch": (0, 4.2), "brow_slope": (-0.16, 0.14),
    "brow_t": (1.1, 2.7), "brow_in": (5, 9.5), "brow_out": (26, 31), "brow_dark": (0.5, 1), "nose_w": (6.2, 10),
    "nose_y": (6, 11), "nose_ridge": (3.0, 5.5), "nose_high": (5, 9), "nostril": (0.4, 1), "mouth_w": (12.5, 17),
    "mouth_y": (26, 29.5), "lip_up": (1.8, 4.6), "lip_low": (2.8, 6.4), "bow": (0, 1.7), "lip_red": (0, 1),
    "cheek": (0, 4), "chin_dimple": (0, 1), "ear": (0, 3), "age": (0, 1), "freckles": (-1, 1), "beard": (-1.2, 1),
    "glasses": (0, 1), "frame_w": (12, 15), "frame_h": (7.5, 10.5), "frame_round": (2, 4), "frame_hue": (0, 1),
    "mottle": (0.5, 1), "tex_u": (0, 1), "tex_v": (0, 1), "scar": (0, 1), "scar_u": (-26, 26), "scar_v": (-36, 36),
    "scar_turn": (0, 3.1),
}  # fmt: skip
IMAGE = {
    "yaw": (-0.32, 0.32), "pitch": (-0.16, 0.16), "roll": (-0.07, 0.07), "zoom": (0.96, 1.05), "shift_x": (-1.6, 1.6),
    "shift_y": (-1.6, 1.6), "open": (-0.6, 1), "smile": (-0.6, 1), "raise_brow": (-0.8, 1.2), "lid": (0.72, 1.05),
    "gaze": (-1.2, 1.2), "light_x": (-0.9, 0.9), "light_y": (-0.8, 0.25), "key": (0.65, 1.1), "fill": (0.3, 0.6),
    "warm": (-1, 1), "tint": (-1, 1), "exposure": (0.72, 1.2), "hair_tone": (0.6, 1.5), "hair_move": (-1, 1),
    "hair_len": (-8, 8), "flush": (0, 1), "wear": (0, 1), "shave": (0.5, 1.1), "blur": (-0.4, 0.7), "grain": (0.3, 1.6),
    "grain_u": (0, 1), "grain_v": (0, 1), "back_r": (0, 1), "back_g": (0, 1), "back_b": (0, 1), "back_turn": (0, 6.3),
    "cover": (0, 1), "cover_kind": (0, 1), "cover_at": (-3, 3), "cover_hue": (0, 1), "cloth": (0, 1),
}  # fmt: skip
MOLES = 5
SKIN = ((240, 208, 188), (228, 186, 158), (204, 154, 120), (158, 110, 80), (112, 74, 54))  # sRGB, light to dark
HAIR = ((28, 22, 20), (52, 36, 26), (88, 58, 38), (126, 84, 50), (176, 134, 84), (128, 62, 34), (150, 146, 142))
IRIS = ((62, 38, 22), (98, 62, 32), (122, 98, 52), (92, 116, 78), (84, 118, 150), (112, 132, 146), (60, 92, 132))
FABRIC = ((52, 60, 82), (120, 40, 44), (70, 92, 74), (196, 190, 180), (60, 58, 60), (112, 140, 168), (186, 150, 84))
FRAME = ((24, 22, 24), (70, 44, 28), (40, 44, 66), (120, 112, 104), (96, 30, 36))


def _mix(h: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: a bijection of uint64 that scatters neighbours."""
    h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return h ^ (h >> np.uint64(31))


def _uniform(count: int, *keys: int | np.ndarray) -> np.ndarray:
    """``count`` numbers in [0, 1) for each entry of the broadcast integer ``keys``: (n, count) float64."""
    h = np.zeros(1, np.uint64)
    for key in keys:
        h = _mix(h + np.uint64(0x9E3779B97F4A7C15) + np.atleast_1d(np.asarray(key)).astype(np.uint64))
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (_mix(h[:, None] + steps) >> np.uint64(11)) * 2.0**-53


def _draw(table: dict[str, tuple[float, float]], *keys: int | np.ndarray) -> dict[str, Tensor]:
    low, high = np.array(list(table.values()), float).T
    values = torch.from_numpy((low + (high - low) * _uniform(len(table), *keys)).astype(np.float32))
    return {name: values[:, k, None, None] for k, name in enumerate(table)}


@cache
def _noise(size: int = 256) -> Tensor:
    """Periodic white, fine (1.2 px) and soft (3 px) noise of unit variance, (3, size, size)."""
    u = torch.from_numpy(_uniform(size * size * 3, 20230711)).view(3, size, size)
    white = torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6))
    f = torch.fft.fftfreq(size, dtype=torch.float64)
    f2 = f[:, None] ** 2 + f[None] ** 2
    low = [torch.exp(-2 * (torch.pi * s) ** 2 * f2) for s in (0.0, 1.2, 3.0)]
    noise = torch.fft.ifft2(torch.fft.fft2(white) * torch.stack(low)).real
    return (noise / noise.std((1, 2), keepdim=True)).float()


def _sample(texture: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Periodic bilinear look-up of (h, w) ``texture`` at column ``u``, row ``v`` (texels), any shape."""
    h, w = texture.shape
    i, j = v.floor(), u.floor()
    a, b = v - i, u - j
    i, j = i.long() % h, j.long() % w
    flat, i1, j1 = texture.reshape(-1), (i + 1) % h * w, (j + 1) % w
    i = i * w
    top = torch.lerp(flat[i + j], flat[i + j1], b)
    return torch.lerp(top, torch.lerp(flat[i1 + j], flat[i1 + j1], b), a)


def _palette(colours: Sequence[Sequence[int]], at: Tensor) -> Tensor:
    """Linear-light RGB (n, 3, 1, 1) at position ``at`` (n, 1, 1) in [0, 1] along the sRGB ``colours``."""
    table = (torch.tensor(colours, dtype=torch.float32) / 255) ** 2
    x = at.view(-1).clamp(0, 1) * (len(colours) - 1)
    low = x.long().clamp(max=len(colours) - 2)
    return torch.lerp(table[low], table[low + 1], (x - low)[:, None])[..., None, None]


def _edge(distance: Tensor, soft: float | Tensor = 1.0) -> Tensor:
    """Coverage in [0, 1] of a pixel at signed ``distance`` inside an outline: an antialiased step."""
    return (distance / soft + 0.5).clamp(0, 1)


def _bump(x: Tensor, width: float | Tensor) -> Tensor:
    return torch.exp(-0.5 * (x / width) ** 2)


def _spot(u: Tensor, v: Tensor, at_u, at_v, width_u, width_v) -> Tensor:
    return torch.exp(-0.5 * (((u - at_u) / width_u) ** 2 + ((v - at_v) / width_v) ** 2))


def _skin_texture(p: SimpleNamespace, moles: Tensor) -> Tensor:
    """(n, 3, 176, 144) at 1.5 texels a pixel: darkening, redness and beard of the skin of n identities."""
    v, u = torch.meshgrid((torch.arange(176) - 88) / 1.5 - 4, (torch.arange(144) - 72) / 1.5, indexing="ij")
    u, v, au = u[None], v[None], u.abs()[None]
    fine, soft = (_sample(_noise()[k], u * s + p.tex_u * 256, v * s + p.tex_v * 256) for k, s in ((1, 1.0), (2, 0.9)))
    dark = p.mottle * (0.035 * fine + 0.04 * soft)
    cheeks = _spot(au, v, 20, 4, 11, 8) + _spot(au, v, 0, 2, 7, 6)
    dark = dark + p.freckles.clamp(min=0) * 0.38 * ((fine + 0.6 * soft - 1.0) * 1.6).clamp(0, 1) * cheeks
    for k in range(MOLES):
        at_u, at_v, size, depth, _ = moles[:, k].T[..., None, None]
        dark = dark + 0.75 * depth * _edge(0.9 + 1.0 * size - ((u - at_u) ** 2 + (v - at_v) ** 2).sqrt(), 1.3)
    turn_u, turn_v = torch.cos(p.scar_turn), torch.sin(p.scar_turn)
    along = (u - p.scar_u) * turn_u + (v - p.scar_v) * turn_v
    across = (v - p.scar_v) * turn_u - (u - p.scar_u) * turn_v + 0.02 * along**2
    dark = dark - 0.25 * (p.scar > 0.75) * _bump(across, 0.8) * _edge(6 - along.abs(), 4)
    lines = torch.sin(1.05 * v + 0.9 * soft + 6 * p.tex_u) ** 8 * _spot(au, v, 0, -35, 16, 5)
    old = (p.age - 0.35).clamp(min=0)
    dark = dark + old * (0.28 * lines + 0.14 * _spot(au, v, 17, -4, 7, 2.2))
    red = 0.9 * _spot(au, v, 22, 8, 9, 8) + 0.7 * _spot(au, v, 0, 7, 6, 5) + 0.3 * _spot(au, v, 0, 42, 8, 5) + 0.1 * soft
    jaw = _edge(v - 14 - 0.05 * (au - p.mouth_w).clamp(min=0) ** 2 * 0 + 0.35 * (36 - au).clamp(max=0), 9) * _edge(v - 15 + 0.02 * (au - 22).clamp(min=0) ** 2, 6)
    hole = _spot(au, v, 0, p.mouth_y + 1, p.mouth_w * 0.55, 4.5)
    hairs = (0.72 + 0.2 * fine + 0.1 * soft).clamp(0, 1)
    beard = jaw * (1 - hole) * hairs * p.beard.clamp(min=0) * (p.gender > 0.5)
    return torch.stack([dark, red, beard], 1)


def _relief(p: SimpleNamespace, u: Tensor, v: Tensor) -> Tensor:
    """Height of the face towards the viewer, in pixels."""
    au = u.abs()
    rise = _edge(v + 14, 12) * _edge(p.nose_y + 1.5 - v, 5) * (0.45 + 0.55 * _edge(v + 4, 22))
    z = -(u**2) / 62 - (u / 38) ** 4 * 6 - (v + 6) ** 2 / 150
    z = z + p.nose_high * rise * _bump(u, p.nose_ridge) + 2.4 * _spot(u, v, 0, p.nose_y - 1, 4.2, 3.6)
    z = z + 2.0 * _spot(au, v, p.nose_w * 0.72, p.nose_y + 1.2, 2.8, 2.8)
    z = z + 2.0 * _spot(au, v, 15, -20, 11, 4) - 3.2 * _spot(au, v, p.eye_x - 1, -12, 8, 5) + 1.4 * _spot(au, v, p.eye_x, -12, 5, 4)
    z = z + p.cheek * _spot(au, v, 24, 5, 8, 7) + 3.0 * _spot(u, v, 0, 25, 13, 8) + 3.2 * _spot(u, v, 0, p.chin - 7, 9, 5.5)
    z = z - 1.3 * _spot(u, v, 0, p.mouth_y + p.lip_low + 4, 8, 2.6) - 0.8 * p.chin_dimple * _spot(u, v, 0, p.chin - 6, 1.6, 3)
    return z


def _coarse(p: SimpleNamespace) -> dict[str, Tensor]:
    """Smooth fields on every second pixel, then interpolated: face frame, light, gloss and large outlines."""
    y, x = torch.meshgrid(torch.arange(0, 113, 2.0), torch.arange(0, 113, 2.0), indexing="ij")
    x, y = x[None] - 56 - p.shift_x, y[None] - 64 - p.shift_y
    a, b = (x + p.roll * y) / p.zoom, (y - p.roll * x) / p.zoom
    u, v = a, b
    sin_y, sin_p = torch.sin(p.yaw), torch.sin(p.pitch)
    for _ in range(3):
        z = 4 - u**2 / 75 - v**2 / 150 + 0.8 * p.nose_high * _spot(u, v, 0, 4, 7, 9)
        u, v = (a - sin_y * z) / torch.cos(p.yaw), (b - sin_p * z) / torch.cos(p.pitch)
    au, out = u.abs(), {"u": u, "v": v}
    height = _relief(p, u, v) - sin_y * u * 1.0 - sin_p * v
    dy, dx = torch.gradient(height, spacing=2.0, dim=(1, 2))
    norm = torch.rsqrt(dx**2 + dy**2 + 1)
    lz = torch.rsqrt(p.light_x**2 + p.light_y**2 + 1)
    facing = (-dx * p.light_x - dy * p.light_y + 1) * norm * lz
    shadow = 0.35 * _spot(u, v, -4.5 * p.light_x, p.nose_y + 5.5, 6, 3) + 0.4 * _spot(u, v, 0, p.chin + 12, 30, 6)
    out["diffuse"] = ((facing + 0.25) / 1.25).clamp(min=0) * (1 - shadow)
    half = (-dx * p.light_x - dy * (p.light_y - 0.2) + 2.4) * norm * torch.rsqrt(p.light_x**2 + (p.light_y - 0.2) ** 2 + 5.8)
    out["gloss"] = half.clamp(0, 1) ** 24
    low, high = ((v + 4) / (p.chin + 4)).clamp(min=0), ((-4 - v) / 66).clamp(min=0)
    out["face"] = (1 - (u / p.width) ** 2 - low**p.jaw - high**2.2) * p.width / 2.1
    out["ear"] = 6.2 - (((au - p.width - 0.5 - 0.6 * p.ear) / 0.75) ** 2 + ((v - 0.5) * 0.56) ** 2).sqrt()


    crown = (1 - (u / (p.width + 5 + 3 * p.volume)) ** 2 - ((v + 14).clamp(max=0) / (50 + 8 * p.volume)) ** 2) * 20
    out["hair_back"] = torch.minimum(crown, (p.length - v) * 0.6)
    sweep = p.sweep * u + p.hair_move * 0.03 * u
    open_v = ((p.front + sweep - v) / 26 + 1).clamp(min=0)
    out["hair_open"] = (1 - (au / (p.width - 3.5 + p.temple)) ** 4 - open_v**3) * 11
    out["hair_side"] = p.side_len - v
    angle = torch.atan2(u - p.part, 40 - 0.55 * v.clamp(max=40))
    out["strand"] = angle * 60 + 0.02 * v * p.hair_move
    out["radius"] = ((u - p.part * 0.6) ** 2 * 0.6 + (v + 5) ** 2).sqrt()
    turn = (x * torch.cos(p.back_turn) + y * torch.sin(p.back_turn)) / 80
    out["back"] = turn.clamp(-1, 1)
    fields = F.interpolate(torch.stack(list(out.values()), 1), (113, 113), mode="bilinear", align_corners=True)
    return dict(zip(out, fields[..., :SIDE, :SIDE].unbind(1), strict=True))


def _composites(p: SimpleNamespace) -> None:
    """Derive what several factors decide together: hair style, skin, colours."""
    woman, style = p.gender < 0.5, p.hair_style
    p.volume = torch.where(woman, 0.6 + style, 0.2 + 0.9 * style)
    p.length = torch.where(woman, -10 + 130 * style, -14 + 30 * (style - 0.75).clamp(min=0) * 4) + p.hair_len
    p.side_len = torch.where(woman, p.length - 4, -16 + 16 * style + 0.5 * p.hair_len)
    p.front = p.hairline + torch.where(woman, 14 * (style > 0.6) * (p.part.abs() < 6), -4 * (style < 0.3) * 1.0)
    p.front = p.front + 0.8 * p.hair_move
    p.sweep = 0.012 * p.part
    p.temple = torch.where(woman, -2.5, 1.5) + 0.6 * p.hair_move
    p.skin = _palette(SKIN, 0.05 + 0.8 * p.tone**1.4)
    warm = torch.tensor([0.02, 0.0, -0.05])[:, None, None]
    p.skin = p.skin * (1 + warm * p.undertone[:, None])
    p.hair = _palette(HAIR, p.hair_hue * (1 - 0.6 * p.tone)) * p.hair_tone[:, None]
    p.iris = _palette(IRIS, p.iris_hue * (1 - 0.75 * (p.tone > 0.7))) * (0.6 + 0.8 * p.iris_light[:, None])
    p.lips = p.skin * (1 - torch.tensor([0.22, 0.52, 0.46])[:, None, None] * (0.45 + 0.55 * p.lip_red[:, None]))


def _paint(canvas: Tensor, colour: Tensor, mask: Tensor) -> Tensor:
    """Lay ``colour`` (n, 3, ...) over ``canvas`` (n, 3, h, w) where ``mask`` (n, h, w) is 1."""
    return torch.lerp(canvas, colour.expand_as(canvas), mask[:, None])


def _eyes(p: SimpleNamespace, face: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Eyes, lids and brows on the band ``face`` (n, 3, h, 112) of skin."""
    au, side = u.abs(), u.sign()
    x, y = au - p.eye_x, v - p.eye_y
    y = y + p.tilt * x
    s = (x / p.eye_w).clamp(-1.4, 1.4)
    bell = (1 - (s - 0.12 * (1 - s**2)) ** 2).clamp(min=0)
    upper, lower = y + p.eye_up * p.lid * bell, (p.eye_low - 0.25 * p.smile) * bell - y
    skin = p.skin
    fade = _edge(1.12 - s.abs(), 0.3)
    face = face * (1 - 0.34 * _bump(upper + p.crease, 0.8) * fade)[:, None]
    face = face * (1 - 0.16 * _bump(y + p.eye_up + 1, 3.2) * fade)[:, None]
    face = face * (1 - 0.22 * p.bag * _bump(lower + 3.2, 1.1) * fade - 0.12 * _bump(lower + 0.7, 0.8) * fade)[:, None]
    white = torch.tensor([0.80, 0.75, 0.72])[:, None, None] * (1 - 0.45 * _bump(upper - 0.2, 1.5) - 0.25 * s**2)[:, None]
    gx, gy = x - p.gaze * side, y + 0.35
    r = (gx**2 + gy**2).sqrt()
    iris = p.iris * (0.55 + 0.75 * _edge(r - 0.5 * p.iris_r, 2.5) - 0.75 * _edge(r - p.iris_r + 0.7, 1.0))[:, None]
    iris = iris * (1 - 0.35 * _bump(upper, 1.8))[:, None]
    eye = _paint(white, iris, _edge(p.iris_r - r, 1.0))
    eye = eye * (1 - 0.96 * _edge(0.42 * p.iris_r - r, 1.0))[:, None]
    glint = _spot(gx * side, gy, 1.1 * p.light_x, -1.2, 0.75, 0.75)
    eye = eye + 0.8 * glint[:, None]
    pink = _spot(x, y, -p.eye_w + 0.9, 0.4, 1.0, 0.8)
    eye = _paint(eye, skin * 0.9, 0.8 * pink)
    face = _paint(face, eye, _edge(torch.minimum(upper, lower), 1.0))
    lash = _bump(upper + 0.25 * p.lash, 0.42 * p.lash * (1.1 + 0.35 * s)) * fade * (p.lid * 0 + 0.9)
    face = _paint(face, 0.25 * p.hair.clamp(max=0.1) + 0.004, lash)
    t = (au - p.brow_in) / (p.brow_out - p.brow_in)
    line = p.brow_y - p.raise_brow - p.brow_arch * (1 - ((t - 0.62) / 0.62) ** 2) + 1.8 + p.brow_slope * (au - 16)
    thick = p.brow_t * (1.15 - 0.85 * t.clamp(0, 1) ** 2)
    noise = _sample(_noise()[1], (au + 0.7 * v) * 1.6 + 256 * p.tex_u, (v - 0.4 * au) * 0.5 + 256 * p.tex_v)
    brow = _edge(thick - (v - line).abs() + 0.15 * noise, 1.7) * _edge(t + 0.02, 0.16) * _edge(1 - t, 0.12)
    return _paint(face, p.brow, brow * p.brow_dark * (0.82 + 0.1 * noise))


def _mouth(p: SimpleNamespace, face: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Lips, teeth and the folds around them on the band ``face`` of skin."""
    width = p.mouth_w + 1.1 * p.smile
    s = u / width
    bell = (1 - s**2).clamp(min=0)
    gap = 3.2 * p.open.clamp(min=0) * bell
    y = v - p.mouth_y + 2.2 * p.smile * s**2 - 0.25 * torch.cos(9 * s)
    top, low = y + 0.45 * gap, y - 0.55 * gap
    upper = top + p.lip_up * bell**0.8 - p.bow * _bump(u, 2.0) * 0.9
    lower = p.lip_low * bell - low
    fold_x = p.nose_w + 3 + (width - p.nose_w + 1.5) * ((v - p.nose_y) / (p.mouth_y - p.nose_y)).clamp(0, 1.2)
    fold = _bump(u.abs() - fold_x, 1.5) * _edge(v - p.nose_y - 2, 6) * _edge(p.mouth_y + 1 - v, 6)
    face = face * (1 - (0.10 + 0.12 * p.age + 0.12 * p.smile.clamp(min=0)) * fold)[:, None]
    face = face * (1 - 0.22 * _spot(u, lower, 0, -1.8, 0.6 * width, 1.5) - 0.25 * _bump(u.abs() - width, 1.2) * _bump(y, 1.3))[:, None]
    lip = p.lips * (0.86 - 0.16 * _bump(top, 1.6) + 0.26 * _spot(u, low, 0, 0.5 * p.lip_low, 0.5 * width, 1.2) - 0.06 * (top < 0))[:, None]
    face = _paint(face, lip, _edge(torch.minimum(upper, lower), 1.2) * 0.92 * _edge(1.02 - s.abs(), 0.12))
    teeth = 0.55 * _edge(0.62 * gap - top, 1.0) * (1 - 0.5 * s**2)
    inside = torch.tensor([0.10, 0.03, 0.03])[:, None, None] + teeth[:, None]
    inner = torch.minimum(top, -low)
    face = _paint(face, inside, _edge(inner, 1.0) * (gap > 0.01))
    return face * (1 - 0.55 * _bump(y, 0.65 + 0.1 * gap) * (gap < 1.5) * _edge(1.0 - s.abs(), 0.1))[:, None]


def _nose(p: SimpleNamespace, face: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Nostrils, wings and the shade under the tip on the band ``face`` of skin."""
    au, y = u.abs(), v - p.nose_y
    dark = 0.7 * p.nostril * _spot(au, y, 0.52 * p.nose_w, 3.1, 1.5 + 0.08 * p.nose_w, 0.95)
    wing = ((au - 0.62 * p.nose_w) ** 2 / 0.9 + (y - 0.3) ** 2).sqrt() - 0.42 * p.nose_w
    dark = dark + 0.26 * _bump(wing, 0.8) * _edge(au - 0.75 * p.nose_w, 1.5) * _edge(3.2 - y.abs(), 2)
    dark = dark + 0.20 * _spot(u, y, 0, 4.2, 0.6 * p.nose_w, 1.4) + 0.10 * _bump(au - 0.62 * p.nose_w, 1.2) * _edge(-y - 2, 3) * _edge(y + 16, 6)
    return face * (1 - dark)[:, None]


def _glasses(p: SimpleNamespace, canvas: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Frames for the people who wear them, in most of their images."""
    au, y = u.abs() - 1.3 * p.yaw * u.sign() * 4, v - p.eye_y - 1.0
    q = p.frame_round
    ring = 1 - ((au - 17.5).abs() / p.frame_w) ** q - ((y / p.frame_h).abs()) ** q
    distance = ring * p.frame_h / q
    worn = ((p.glasses > 0.74) & (p.wear > 0.25)).float()
    frame = _edge(1.1 - distance.abs(), 1.0)
    frame = torch.maximum(frame, _edge(1.0 - (y + 2.2 + 0.05 * u**2 * 0).abs(), 1.0) * _edge(17.5 - p.frame_w - au, 1))
    frame = torch.maximum(frame, _edge(1.0 - (y + 3.0).abs(), 1.0) * _edge(au - 17.5 - p.frame_w + 0.5, 1) * _edge(p.width + 1 - au, 2))
    lens = canvas * (1 - 0.08 * worn * _edge(distance, 1.0))[:, None] + (0.03 * worn * _edge(distance, 1) * _edge(y + au * 0.4 - 6, 2))[:, None]
    return _paint(lens, _palette(FRAME, p.frame_hue), 0.95 * frame * worn)


def _finish(p: SimpleNamespace, image: Tensor) -> Tensor:
    """Exposure, lens blur, compression of the colour planes and grain; (n, 3, 112, 112) linear to uint8."""
    image = (image * p.exposure[:, None]).clamp(min=0)
    image = (image * (1 + 0.25 * image) / (1 + 0.45 * image)).sqrt()  # a soft shoulder, then gamma 2
    wide = F.pad(image, (1, 1, 1, 1), mode="replicate")
    rows = wide[:, :, 1:-1] * 2 + wide[:, :, :-2] + wide[:, :, 2:]
    soft = (rows[..., 1:-1] * 2 + rows[..., :-2] + rows[..., 2:]) / 16
    image = torch.lerp(image, soft, p.blur.clamp(min=0)[:, None])
    chroma = image - image[:, 1:2]
    half = F.interpolate(F.avg_pool2d(chroma, 2), SIDE, mode="bilinear")
    image = image[:, 1:2] + half
    row, column = (p.grain_v * 256).long().view(-1), (p.grain_u * 256).long().view(-1)
    step = torch.arange(SIDE)
    noise = _noise().mul(torch.tensor([0.8, 0.8, 0.0])[:, None, None]).sum(0)
    grain = noise[((row[:, None] + step) % 256)[:, :, None], ((column[:, None] + step) % 256)[:, None]]
    image = image * 255 + (grain * p.grain * 1.6)[:, None]
    return image.clamp(0, 255).round().to(torch.uint8)


def _render(p: SimpleNamespace, texture: Tensor) -> Tensor:
    """Draw n faces from their parameters (each (n, 1, 1)) and skin textures (n, 3, 176, 144): uint8."""
    _composites(p)
    f = SimpleNamespace(**_coarse(p))
    u, v = f.u, f.v
    au = u.abs()
    # behind: hair, neck and clothes, ears
    strand = _sample(_noise()[1], f.strand + 256 * p.tex_u, f.radius * 0.12 + 256 * p.tex_v)
    strand2 = _sample(_noise()[2], f.strand * 1.3 + 256 * p.tex_u, f.radius * 0.07 + 256 * p.tex_v)
    ring = _bump(f.radius - 46, 7)
    hair = p.hair * (0.72 + 0.16 * strand + 0.14 * strand2 + 0.7 * ring * (0.5 + 0.4 * strand2).clamp(0, 1)).clamp(min=0.15)[:, None]
    neck = _edge(29 - au + 0.02 * (v - 40) ** 2, 1.5) * _edge(v - 22, 8)
    shirt = _edge(v - 54 + 0.004 * (au - 60) ** 2 * 0 + 0.10 * (au - 16), 1.5)
    back_hair = _edge(f.hair_back, 1.6)
    cloth = _palette(FABRIC, p.cloth).expand(-1, -1, SIDE, SIDE)
    canvas = _paint(cloth, hair, back_hair)
    canvas = _paint(canvas, p.skin * 0.55, neck)
    canvas = _paint(canvas, cloth, shirt)
    ear = _edge(f.ear, 1.3)
    canvas = _paint(canvas, p.skin * (0.78 - 0.25 * _bump(f.ear - 2.2, 1.0))[:, None], ear)
    face_mask = _edge(f.face, 1.3)
    # the face
    grid = torch.stack([(u * 1.5 + 0.5) / 72, ((v + 4) * 1.5 + 0.5) / 88], -1)
    dark, red, beard = F.grid_sample(texture, grid, align_corners=False, padding_mode="border").unbind(1)
    face = p.skin * (1 - dark)[:, None]
    face = face * (1 + (red * (0.5 + 0.5 * p.flush))[:, None] * torch.tensor([0.05, -0.16, -0.13])[:, None, None])
    face = _paint(face, 0.85 * p.brow + 0.02, (0.72 * beard * p.shave).clamp(0, 1))
    face = face * (1 - 0.30 * _bump(f.face, 4.5))[:, None]
    rows, columns = slice(26, 72), slice(16, 96)
    for part, band in ((_nose, slice(46, 86)), (_mouth, slice(74, 112)), (_eyes, slice(26, 74))):
        face[:, :, band] = part(p, face[:, :, band], u[:, band], v[:, band])
    canvas = _paint(canvas, face, face_mask)
    fringe = torch.minimum(torch.minimum(-f.hair_open, f.hair_side * 0.5), f.hair_back + 4) + 0.5 * strand
    front = _edge(fringe, 1.8)
    under = _edge(fringe + 3, 7) * face_mask * 0.35
    canvas = canvas * (1 - under * (1 - front))[:, None]
    canvas = _paint(canvas, hair, front)
    canvas = _glasses(p, canvas, u, v)
    # light
    tint = torch.stack([0.12 * p.warm, 0.05 * p.tint, -0.14 * p.warm], 1)
    light = (1 + tint) * (1.25 * p.key * f.diffuse)[:, None] + (1 - 0.6 * tint) * p.fill[:, None]
    canvas = canvas * light + (0.10 * p.key * f.gloss * face_mask * (1 - front))[:, None]
    wall = torch.stack([p.back_r, p.back_g, p.back_b], 1)
    wall = (0.08 + 0.5 * (0.75 * wall[:, 1:2] + 0.25 * wall)) * (0.75 + 0.35 * f.back)[:, None]
    solid = torch.maximum(torch.maximum(face_mask, front), torch.maximum(torch.maximum(ear, back_hair), torch.maximum(neck * (v > 20), shirt)))
    canvas = torch.lerp(wall, canvas, solid[:, None])
    return _finish(p, canvas)


def render(identity: np.ndarray, image: np.ndarray, seed: int) -> Tensor:
    """Images ``image[k]`` of persons ``identity[k]``: uint8 RGB (n, 3, 112, 112)."""
    people, where = np.unique(identity, return_inverse=True)
    p = SimpleNamespace(**_draw(IDENTITY, seed, people, 1))
    moles = torch.from_numpy(_uniform(MOLES * 5, seed, people, 2).astype(np.float32)).view(-1, MOLES, 5)
    moles = moles * torch.tensor([60, 80, 0.9, 1.6, 1]) + torch.tensor([-30, -38, 0, -0.6, 0])
    moles[..., 3] = moles[..., 3].clamp(0, 1)
    texture = _skin_texture(p, moles)[where]
    for name, value in list(vars(p).items()):
        setattr(p, name, value[where])
    for name, value in _draw(IMAGE, seed, identity, image, 3).items():
        setattr(p, name, value)
    p.brow = _palette(HAIR, 0.7 * p.hair_hue * (1 - 0.6 * p.tone)) * 0.7
    return _render(p, texture)


class SyntheticFaces(torch.utils.data.Dataset):
    """A FaceSet of ``identities`` people with ``images`` pictures each, drawn when first asked for and kept.

    Image ``i`` is picture ``i % images`` of person ``first + i // images``; ``first`` gives disjoint sets of one seed.
    """

    def __init__(self, identities: int, images: int, seed: int = 0, first: int = 0) -> None:
        for name, value, least in (("identities", identities, 1), ("images", images, 1), ("seed", seed, 0), ("first", first, 0)):
            if not isinstance(value, int) or value < least:
                raise ConfigError(f"synthetic faces: {name}: got {value!r}, expected a whole number >= {least}")
        self.name = f"synthetic:identities={identities},images={images},seed={seed},first={first}"
        self.checksum = hashlib.sha256(f"{self.name},version={VERSION}".encode()).hexdigest()
        self.num_identities, self.per_identity, self.seed, self.first = identities, images, seed, first
        self.labels = torch.arange(identities).repeat_interleave(images)
        self._cache: Tensor | None = None
        self._done = torch.zeros(-(-len(self.labels) // BLOCK), dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        if not -len(self) <= i < len(self):
            raise IndexError(f"{self.name}: image {i}, there are {len(self)}")
        i %= len(self)
        return self.images([i])[0], int(self.labels[i])

    def images(self, indices: Sequence[int] | Tensor) -> Tensor:
        """uint8 RGB (n, 3, 112, 112) of the images at ``indices``."""
        index = torch.as_tensor(indices, dtype=torch.int64).view(-1)
        if self._cache is None:
            self._cache = torch.empty(len(self), 3, SIDE, SIDE, dtype=torch.uint8)
        for block in torch.unique(index // BLOCK).tolist():
            if not self._done[block]:
                i = np.arange(block * BLOCK, min((block + 1) * BLOCK, len(self)))
                pictures = render(self.first + i // self.per_identity, i % self.per_identity, self.seed)
                self._cache[i[0] : i[-1] + 1] = pictures
                self._done[block] = True
        return self._cache[index]

    def render_all(self) -> Tensor:
        """Every image, drawn now: uint8 RGB (N, 3, 112, 112), about 37 KiB each."""
        return self.images(range(len(self)))
