"""`python -m diffusion_unet`, and so `accelerate launch -m diffusion_unet train CONFIG`."""

import sys

from diffusion_unet.cli import main

if __name__ == "__main__":
    sys.exit(main())
