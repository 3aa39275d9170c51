"""Teach a text-to-image model a subject from a few photos: gsoft-train, from a checkout."""

from gsoft_diffusion.commands import train

if __name__ == "__main__":
    train()
