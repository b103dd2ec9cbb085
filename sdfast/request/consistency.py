"""What the fields of a request must be beside each other."""

from typing import TYPE_CHECKING

from sdfast.request.fields import MAX_IMAGES, MAX_STEPS, SEED_LIMIT

if TYPE_CHECKING:
    from sdfast.request.request import Hires, Request


def check_consistent(request: "Request") -> None:
    """Raises `ValueError` for fields that do not go together."""
    _check_steps(request)
    _check_guidance(request)
    _check_texts(request)
    _check_number(request)
    _check_control_spans(request)
    _check_seeds(request)
    _check_shares(request)
    _check_composed(request)
    _check_masked(request)
    _check_pag(request)
    if request.hires is not None:
        _check_hires(request, request.hires)


def _check_steps(request: "Request") -> None:
    """Raises `ValueError` where the steps are not given exactly once."""
    given = [n for n in ("num_inference_steps", "timesteps", "sigmas") if getattr(request, n) is not None]
    if len(given) != 1:
        raise ValueError(
            f"give exactly one of num_inference_steps, timesteps, sigmas (got {given or 'none'})"
        )


def _check_guidance(request: "Request") -> None:
    """Raises `ValueError` for guidance in no step, and for shallow steps that have nothing to take for it."""
    if request.guidance_start >= request.guidance_end:
        raise ValueError(
            f"guidance_start: {request.guidance_start:g} is not below guidance_end, {request.guidance_end:g}"
        )
    if request.cache_interval > 1 and request.guidance_start > 0:
        raise ValueError(
            f"cache_interval: with guidance_start {request.guidance_start:g}, the first shallow steps with "
            "guidance would have nothing to take for the negative prompt; leave one of the two out"
        )


def _check_texts(request: "Request") -> None:
    """Raises `ValueError` for texts that are not one for each prompt, and for a second one alone."""
    if len(request.negative_prompts) != len(request.prompts):
        raise ValueError(
            f"negative_prompts: {len(request.negative_prompts)} for {len(request.prompts)} prompts; "
            "give one for each, or a single one for all"
        )
    for name in ("prompts_2", "negative_prompts_2"):
        texts = getattr(request, name)
        if texts is not None and len(texts) != len(request.prompts):
            raise ValueError(
                f"{name}: {len(texts)} for {len(request.prompts)} prompts; "
                "give one for each, or a single one for all"
            )
    if any(second is not None and first is None for first, second in request.negative_pairs):
        raise ValueError("negative_prompts_2: its first text encoder has none; give a negative prompt too")


def _check_number(request: "Request") -> None:
    """Raises `ValueError` for too many pictures."""
    if request.images > MAX_IMAGES:
        raise ValueError(
            f"num_images_per_prompt: {request.num_images_per_prompt} for {len(request.prompts)} prompts are "
            f"{request.images} pictures; at most {MAX_IMAGES} in one request"
        )


def _check_control_spans(request: "Request") -> None:
    """Raises `ValueError` for those without a step, and without a control image."""
    spans = request.control_spans
    for start, end in spans:
        if start >= end:
            raise ValueError(f"control_guidance_start: {start:g} is not below control_guidance_end, {end:g}")
    if request.controlnet_conditioning_scale is not None:
        return
    if spans != [(0.0, 1.0)]:
        raise ValueError(
            "control_guidance_start and control_guidance_end are for a control image; give one, or leave "
            "them out"
        )
    for name in ("control_mode", "control_layer_scales"):
        if getattr(request, name) is not None:
            raise ValueError(f"{name}: is for a control image; give one, or leave it out")


def _check_seeds(request: "Request") -> None:
    """Raises `ValueError` for too few seeds, and for a variation seed without variations."""
    if request.variation_seed is not None and not request.variation_strength:
        raise ValueError(
            "variation_seed: is for a variation_strength above 0; give that too, or leave it out"
        )
    name, first = ("variation_seed", request.variation_seed)
    if first is None:
        name, first = ("seed", request.seed)
    if first + request.images > SEED_LIMIT:
        raise ValueError(f"{name}: {first} leaves no seeds below 2**64 for {request.images} pictures")


def _check_composed(request: "Request") -> None:
    """Raises `ValueError` for several things to be guided to, where guidance is not as that needs."""
    always = not request.guidance_rescale and (request.guidance_start, request.guidance_end) == (0, 1)
    if request.image_guidance_scale is not None and not always:
        raise ValueError(
            "image_guidance_scale: guides in all steps; leave guidance_rescale, guidance_start and "
            "guidance_end out"
        )
    for parts in request.composed:
        if len(parts) == 1 and parts[0][1] == 1:
            continue
        told = "AND adds prompts up" if len(parts) > 1 else f"it ends in a weight, {parts[0][1]:g}"
        if request.guidance_scale <= 1:
            raise ValueError(
                f"prompt: {told}, which is guidance; give a guidance_scale above 1, or write it otherwise"
            )
        if len(parts) == 1:
            continue
        if not always:
            raise ValueError(
                f"prompt: {told} in all steps; leave guidance_rescale, guidance_start and guidance_end out"
            )
        if any(second is not None for (_, second), _ in parts):
            raise ValueError(f"prompt: {told}, each read by both text encoders; leave prompts_2 out, or AND")


def _check_pag(request: "Request") -> None:
    """Raises `ValueError` for perturbed-attention guidance beside what it does not go with."""
    if not request.pag_scale:
        if request.pag_adaptive_scale:
            raise ValueError("pag_adaptive_scale: lowers pag_scale; give that too, or leave it out")
        return
    if request.image_guidance_scale is not None:
        raise ValueError("pag_scale: is not for engines that edit an image; leave it out")
    if (request.guidance_start, request.guidance_end) != (0, 1):
        raise ValueError("pag_scale: guides in all steps; leave guidance_start and guidance_end out")
    if any(len(parts) > 1 for parts in request.composed):
        raise ValueError("pag_scale: is not for prompts that AND adds up; leave one of the two out")


def _check_shares(request: "Request") -> None:
    """Raises `ValueError` for a part of the denoising that is none, or does not go with the rest."""
    start, end = request.denoising_start, request.denoising_end
    if request.image_guidance_scale is not None and (start is not None or request.strength is not None):
        raise ValueError(
            "image_guidance_scale: is for engines that edit an image, and draw from noise alone; leave "
            "strength and denoising_start out"
        )
    if start is not None and request.strength is not None:
        raise ValueError(
            "denoising_start: says which steps are done, and strength does too; leave one of them out"
        )
    if start is not None and end is not None and start >= end:
        raise ValueError(f"denoising_start: {start:g} is not below denoising_end, {end:g}")
    if (start, end) != (None, None) and request.hires is not None:
        raise ValueError(
            "hires: its second pass draws over whole pictures; leave denoising_start and denoising_end out"
        )


def _check_masked(request: "Request") -> None:
    """Raises `ValueError` for what is said of a mask where there is no image, or it is edited as a
    whole."""
    if request.of_mask is None:
        return
    if request.image_guidance_scale is not None:
        raise ValueError(
            f"{request.of_mask}: is for the part of an image that a mask leaves open, and with "
            "image_guidance_scale an image is edited as a whole; leave it out"
        )
    if not request.over:
        raise ValueError(
            f"{request.of_mask}: is for an image to draw over, with a mask; give both, or leave it out"
        )


def _check_hires(request: "Request", hires: "Hires") -> None:
    """Raises `ValueError` for a second pass that does not go with the first."""
    if request.over or request.controlnet_conditioning_scale is not None:
        raise ValueError(
            "hires: is for pictures drawn from noise, without an image or a control image; leave those "
            "out, or draw over the picture in a second call"
        )
    if max(hires.height / request.height, hires.width / request.width) < 1:
        raise ValueError(
            f"hires: {hires.width}x{hires.height} is smaller than the first pass, "
            f"{request.width}x{request.height}; ask for a larger size"
        )
    steps = hires.num_inference_steps or request.num_inference_steps
    if steps is None:
        raise ValueError(
            "hires: give it num_inference_steps, since the first pass has timesteps or sigmas of its own"
        )
    if hires.laid_out(steps) > MAX_STEPS:
        raise ValueError(
            f"hires: {steps} steps at a strength of {hires.strength:g} are of a schedule of "
            f"{hires.laid_out(steps)}, and at most {MAX_STEPS} are taken; raise the strength, or take "
            "fewer steps"
        )
    for name in ("prompts", "negative_prompts"):
        texts = getattr(hires, name)
        if texts is not None and len(texts) != len(request.prompts):
            raise ValueError(
                f"hires: {name}: {len(texts)} for {len(request.prompts)} prompts; give one for each"
            )
