"""Phantoms: synthetic abdominal CT and MRI volumes with five organs, made from a seed.

They let the whole program run without a scan. Anatomy has one distribution for both modalities; the
contrast differs, and in MRI it differs from case to case: the problem that FedGIN exists for. They
are no substitute for patients, and a Dice measured on them says nothing about a clinic.

    from scans.phantom import make_phantom
    image, labels = make_phantom(seed=42, modality="mri", index=0)  # (32, 32, 32) float32 and uint8
    image, labels = make_phantom(42, "ct", 0, scanner="unseen")  # another patient and scanner

Hospitals train on the seen scanner. The unseen one is for testing, like AMOS22 for a network that
trained on TotalSegmentator; its anatomy has the same distribution. It was set before any network
had seen it, from the literature where there is some (see docs/phantoms.md and the renderers):

                               seen                        unseen
    CT contrast phase          portal venous               native, late arterial or delayed
    CT kernel (Gaussian)       0.5 voxels                  0.8 voxels: softer
    CT noise                   10 HU, white                15 HU, correlated over 0.8 voxels
    MRI share of T2 weighting  Beta(0.5, 0.5): most near   0.4 to 0.6: neither T1 nor T2, like
                               0 (T1) or 1 (T2)            one seen case in eight
    MRI signal of fat          0.35 to 1 of it left        0 to 0.2: suppressed
    MRI bias field             0.25 (log, deviation)       0.5
    MRI noise                  0.02                        0.04
"""

import numpy as np
from scipy import ndimage

SIZE = 32  # voxels along each axis
SPACING = 9.0  # mm, so that the volume spans an upper abdomen of 29 cm
ORGANS = ("liver", "kidneys", "spleen", "pancreas", "gallbladder")  # labels 1 to 5

# What fills each tissue: Hounsfield units in four contrast phases of CT, and the relative signal of
# T1- and T2-weighted MRI. The organs' order differs between columns. Order: labels, then the rest.
TISSUES = {
    #               native arterial portal delayed   T1    T2
    "air":         (-1000, -1000, -1000, -1000,     0.00, 0.00),
    "liver":       (56,    76,    110,   95,        0.60, 0.26),
    "kidneys":     (32,    190,   175,   150,       0.40, 0.74),
    "spleen":      (48,    150,   125,   85,        0.34, 0.64),
    "pancreas":    (42,    105,   92,    80,        0.76, 0.46),
    "gallbladder": (12,    12,    12,    12,        0.20, 1.00),
    "fat":         (-100,  -95,   -95,   -95,       0.95, 0.75),
    "muscle":      (50,    56,    58,    59,        0.42, 0.16),
    "spine":       (250,   255,   260,   255,       0.52, 0.36),
    "aorta":       (40,    340,   165,   115,       0.12, 0.08),
    "stomach":     (30,    30,    30,    30,        0.28, 0.70),
    "bowel":       (30,    45,    42,    40,        0.36, 0.54),
}  # fmt: skip
CODE = {name: code for code, name in enumerate(TISSUES)}
NATIVE, ARTERIAL, PORTAL, DELAYED, T1, T2 = np.array(list(TISSUES.values()), dtype=np.float32).T

# Ellipsoids in the order in which they are painted, later ones on top: tissue, centre and radii as
# fractions of the half-width, along x, y and z.
ANATOMY = (
    ("fat",         (0.00, 0.00, 0.00),   (0.94, 0.78, 2.00)),
    ("muscle",      (0.00, 0.00, 0.00),   (0.84, 0.67, 2.00)),
    ("fat",         (0.00, 0.06, 0.00),   (0.76, 0.58, 2.00)),
    ("muscle",      (-0.22, -0.50, 0.00), (0.17, 0.15, 2.00)),
    ("muscle",      (0.22, -0.50, 0.00),  (0.17, 0.15, 2.00)),
    ("spine",       (0.00, -0.42, 0.00),  (0.15, 0.16, 2.00)),
    ("aorta",       (-0.08, -0.20, 0.00), (0.07, 0.07, 2.00)),
    ("bowel",       (0.26, 0.18, -0.60),  (0.24, 0.22, 0.26)),
    ("bowel",       (-0.24, 0.18, -0.66), (0.26, 0.22, 0.24)),
    ("bowel",       (0.02, 0.30, -0.42),  (0.20, 0.16, 0.16)),
    ("stomach",     (-0.30, 0.28, 0.36),  (0.25, 0.20, 0.32)),
    ("spleen",      (-0.57, -0.16, 0.38), (0.17, 0.25, 0.32)),
    ("liver",       (0.36, 0.10, 0.42),   (0.40, 0.46, 0.44)),
    ("liver",       (0.06, 0.30, 0.50),   (0.30, 0.22, 0.26)),
    ("kidneys",     (0.40, -0.28, -0.22), (0.15, 0.16, 0.32)),
    ("kidneys",     (-0.40, -0.28, -0.10), (0.15, 0.16, 0.32)),
    ("pancreas",    (-0.12, 0.02, 0.02),  (0.32, 0.10, 0.12)),
    ("pancreas",    (0.16, 0.06, -0.10),  (0.12, 0.12, 0.16)),
    ("gallbladder", (0.30, 0.34, -0.04),  (0.13, 0.15, 0.18)),
)  # fmt: skip


def make_phantom(
    seed: int, modality: str, index: int, scanner: str = "seen"
) -> tuple[np.ndarray, np.ndarray]:
    """Make one case: the image, (SIZE, SIZE, SIZE) float32, and its labels, the same in uint8.

    CT images are in Hounsfield units, MRI images in arbitrary ones; labels index ORGANS from 1 on.
    Axes run from the patient's left to right, back to front and feet to head (nibabel's RAS+, in
    which scans are read: the liver lies at large x), SPACING mm per voxel. The same arguments give
    the same case; scanners share no patient. Raises ValueError for a modality other than "ct" and
    "mri", and for a scanner other than "seen" and "unseen".
    """
    if modality not in ("ct", "mri"):
        raise ValueError(f'modality must be "ct" or "mri", not {modality!r}')
    if scanner not in ("seen", "unseen"):
        raise ValueError(f'scanner must be "seen" or "unseen", not {scanner!r}')
    unseen = scanner == "unseen"
    rng = np.random.default_rng([seed, ("ct", "mri").index(modality) + 2 * unseen, index])
    tissues = _draw_anatomy(rng)
    render = _render_ct if modality == "ct" else _render_mri
    image = render(tissues, rng, unseen)
    labels = np.where(tissues <= len(ORGANS), tissues, 0)
    return image.astype(np.float32), labels.astype(np.uint8)


def _draw_anatomy(rng: np.random.Generator) -> np.ndarray:
    """Paint ANATOMY with this case's own sizes, places, rotation and smooth deformation."""
    axis = (np.arange(SIZE) + 0.5) * 2 / SIZE - 1
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"))  # (3, x, y, z) in -1…1
    grid = np.tensordot(_rotation(rng.normal(0, np.radians(5), 3)), grid, axes=1)
    grid *= rng.normal(1, 0.04, (3, 1, 1, 1))
    grid += _smooth_noise(rng, (3,), sigma=SIZE / 6) * 0.04
    tissues = np.zeros((SIZE,) * 3, dtype=np.int64)
    for name, centre, radii in ANATOMY:
        loose = 0.0 if 2.0 in radii else 1.0  # what runs through the volume stays in its place
        middle = np.array(centre) + loose * rng.normal(0, 0.04, 3)
        size = np.array(radii) * rng.normal(1, 0.1 * loose + 0.03, 3).clip(0.75, 1.25)
        offset = (grid - middle.reshape(3, 1, 1, 1)) / size.reshape(3, 1, 1, 1)
        tissues[(offset**2).sum(0) < 1] = CODE[name]
    return tissues


def _render_ct(tissues: np.ndarray, rng: np.random.Generator, unseen: bool) -> np.ndarray:
    """Hounsfield values, each tissue a little off, partial volume and quantum noise.

    A kernel shapes the texture of noise (Solomon et al., Med Phys 39:6048, 2012,
    doi:10.1118/1.4752209); low-dose scans had 1.4 times that of standard ones (Husarik et al.).
    """
    phase = (NATIVE, ARTERIAL, DELAYED)[rng.integers(3)] if unseen else PORTAL
    values = phase + rng.normal(0, 12, len(phase)) * (np.arange(len(phase)) > 0)
    image = ndimage.gaussian_filter(values[tissues], 0.8 if unseen else 0.5)
    if unseen:
        return image + 15 * _smooth_noise(rng, (), sigma=0.8)
    return image + rng.normal(0, 10, image.shape)


def _render_mri(tissues: np.ndarray, rng: np.random.Generator, unseen: bool) -> np.ndarray:
    """A mix of T1 and T2 weighting, fat suppressed, partial volume, a bias field and Rician noise.

    Balanced SSFP weights by T2/T1 (Scheffler and Lehnhardt, Eur Radiol 13:2409, 2003,
    doi:10.1007/s00330-003-1957-x). Over livers B1 spans 0.59 to 1.13 at 3 T and half as much, 0.83
    to 1.11, at 1.5 T (Roberts et al., Magn Reson Med 85:2212, 2021, doi:10.1002/mrm.28549).
    """
    t2_weighting = rng.uniform(0.4, 0.6) if unseen else rng.beta(0.5, 0.5)
    values = (1 - t2_weighting) * T1 + t2_weighting * T2
    values *= rng.normal(1, 0.2, len(values)).clip(0.5, 1.5)
    values[CODE["fat"]] *= rng.uniform(0, 0.2) if unseen else rng.uniform(0.35, 1)
    image = ndimage.gaussian_filter(values[tissues], 0.5)
    image *= np.exp((0.5 if unseen else 0.25) * _smooth_noise(rng, (), sigma=SIZE / 3))
    real, imaginary = rng.normal(0, 0.04 if unseen else 0.02, (2, *image.shape))
    return rng.uniform(200, 1000) * np.hypot(image + real, imaginary)


def _smooth_noise(rng: np.random.Generator, lead: tuple, sigma: float) -> np.ndarray:
    """A random field (*lead, SIZE, SIZE, SIZE), mean 0, variance 1, smooth over sigma voxels."""
    field = rng.normal(size=(*lead, SIZE, SIZE, SIZE))
    field = ndimage.gaussian_filter(field, (0,) * len(lead) + (sigma,) * 3, mode="wrap")
    field -= field.mean(axis=(-3, -2, -1), keepdims=True)
    return field / field.std(axis=(-3, -2, -1), keepdims=True)


def _rotation(angles: np.ndarray) -> np.ndarray:
    """The rotation matrix of three angles in radians about x, y and z, in this order."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(angles), np.sin(angles)
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x
