"""AUTOMATIC1111's API, for its clients: `/sdapi/v1/txt2img`, `/img2img`, and what they ask beside these.

`fields.py` what the two take, `samplers.py` and `options.py` what samplers and options mean here,
`controlnet.py` what they say of ControlNets, `networks.py` of LoRAs, `pictures.py` the images that come with
them, `calls.py` what is under way, `answers.py` what is given back, `routes.py` the routes, `lists.py` those
that tell or refuse one fixed thing.

What is asked for is done or refused by name, never ignored. A field that means nothing in a call, such as
`hr_scale` without `enable_hr`, is taken, since clients send them all. Where this differs from AUTOMATIC1111:

- Prompts are read as there, in chunks of 75 tokens and with `(word:1.2)`, `[word]` and BREAK (the option
  `emphasis`, of a request), and change between steps as `[from:to:when]` and `[this|that]` say, which count
  steps as there. AND adds prompts up; with a CFG scale of 1 or less, where there is no negative prompt here,
  it is refused. `<lora:name:0.8>` in a prompt adds a LoRA that the engine was exported with for requests; one
  that it does not have is refused, where there it is passed over. Seeds make other pictures than there, which
  draws its noise on the GPU.
- Engines of InstructPix2Pix edit the image of img2img; image_cfg_scale, 1.5 if left out, is how much that
  guides. They draw from noise alone, whatever denoising_strength says, and take no mask.
- img2img does `int(steps * denoising_strength)` steps, as diffusers does; AUTOMATIC1111 does one more.
- enable_hr draws over the picture at a second size, one of the engine's too, as there: `hr_second_pass_steps`
  are all done, and each picture's noise begins anew from its seed. Pictures that an image upscaler enlarges
  are cropped before they are encoded, where there the latents are. There are no upscalers that are networks.
- refiner_checkpoint is another engine of this server, which goes on with the base's latents at
  refiner_switch_at, by default 0.8: a share of the denoising, as there unless it counts sample steps. It is
  for single passes: with enable_hr it is refused. At 1 the refiner has nothing to do, and the base draws all.
- mask_blur is Pillow's Gaussian blur, which is very nearly the one there.
- A call is one job: all its pictures are drawn beside each other, so `/skip` ends the call that is the first
  under way. `/interrupt` ends all calls of this interface, whoever made them; those of others go on.
- A call that was ended is answered with 200, as there, and with one picture of how far it came: the first
  that was still drawn, without parameters inside; none, if it had not begun.
- `/progress` is about the first call under way. A picture is decoded for those who ask only: a poll without
  `skip_current_image` gets the latest one, and asks for one after the next step.
- An engine's own size, not 512, is drawn where none is given.
- Nothing is saved on the server, and no image is fetched from a URL.
"""

from sdfast.server.automatic1111.routes import routes

__all__ = ["routes"]
