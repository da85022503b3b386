"""Copy-paste (arXiv 2012.07177): the object of one scene in another, for scenes nobody took.

A few hundred photographs are soon known by heart; their pairs are tens of thousands. Backgrounds
are seen with objects they never held, so that neither alone gives the mask away.
"""

import cv2
import numpy as np
from jaxtyping import UInt8

# Sides of a pasted object, in those it has: mostly smaller, because it hides what lies beneath.
SIZES = (0.4, 1.2)
# Deviation of the blur that hides the seam, in pixels.
SEAM = 0.8


def paste(
    image: UInt8[np.ndarray, "h w 3"],
    mask: UInt8[np.ndarray, "h w"],
    other_image: UInt8[np.ndarray, "h2 w2 3"],
    other_mask: UInt8[np.ndarray, "h2 w2"],
    generator: np.random.Generator,
) -> tuple[UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "h w"]]:
    """Return a scene with the object of another in front of it.

    The object is resized (its sides by 0.4 to 1.2, evenly on a log scale), mirrored half the time,
    and put where its middle lies inside the image; what sticks out is cut off.

    Args:
        image: RGB.
        mask: 0 background, 1 object, 255 ignore.
        other_image: RGB, of any size.
        other_mask: Coded like `mask`; without an object the scene stays as it is.
        generator: Every draw comes from it.

    Returns:
        New image and mask; both objects are 1.
    """
    box = cv2.boundingRect((other_mask == 1).view(np.uint8))
    scale = float(np.exp(generator.uniform(*np.log(SIZES))))
    middle = generator.uniform(0, 1, 2) * mask.shape
    mirrored = generator.random() < 0.5
    left, top, width, height = box
    if width == 0:
        return image, mask
    window = np.s_[top : top + height, left : left + width]
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    pixels = cv2.resize(other_image[window], size, interpolation=method)
    labels = cv2.resize(other_mask[window], size, interpolation=cv2.INTER_NEAREST_EXACT)
    if mirrored:
        pixels, labels = pixels[:, ::-1], labels[:, ::-1]
    y, x = (round(m - side / 2) for m, side in zip(middle, labels.shape, strict=True))
    # The part of the object that lies inside the image: in the image, and in the object.
    y0, x0 = max(0, y), max(0, x)
    y1 = min(mask.shape[0], y + labels.shape[0])
    x1 = min(mask.shape[1], x + labels.shape[1])
    there, here = np.s_[y0:y1, x0:x1], np.s_[y0 - y : y1 - y, x0 - x : x1 - x]
    opacity = np.zeros(mask.shape, np.float32)
    opacity[there] = labels[here] == 1
    new_mask = np.where(opacity > 0, np.uint8(1), mask)
    new_image = image.copy()
    opacity = cv2.GaussianBlur(opacity, (0, 0), SEAM, borderType=cv2.BORDER_REPLICATE)
    opacity = opacity[there][..., None]
    new_image[there] = np.rint(image[there] * (1 - opacity) + pixels[here] * opacity)
    return new_image, new_mask
