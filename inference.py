"""Draw pictures with a trained adapter: gsoft-draw, from a checkout."""

from gsoft_diffusion.commands import draw

if __name__ == "__main__":
    draw()
