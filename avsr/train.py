"""Entry module of a training on many devices: ``deepspeed --module avsr.train CONFIG [key=value ...]``."""

from avsr.training.run import main, train

__all__ = ["main", "train"]

if __name__ == "__main__":
    main()
