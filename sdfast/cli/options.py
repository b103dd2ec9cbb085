"""What options offer whose modules take long to import."""

ATTENTION = (  # `sdfast.backends.attention.KINDS`, which takes torch to import
    "auto",
    "sdpa",
    "flash",
    "cudnn",
    "efficient",
    "math",
    "xformers",
)

UPSCALERS = (  # `sdfast.request.Upscaler`, which takes pydantic to import
    "latent",
    "latent_antialiased",
    "latent_bicubic",
    "latent_bicubic_antialiased",
    "latent_nearest",
    "latent_nearest_exact",
    "lanczos",
    "nearest",
)

CONTROL_MODES = ("balanced", "prompt", "control", "guess")  # `sdfast.request.ControlMode`, likewise
