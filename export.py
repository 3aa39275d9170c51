"""Take an adapter to other tools: gsoft-export, from a checkout."""

from gsoft_diffusion.commands import export

if __name__ == "__main__":
    export()
