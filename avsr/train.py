"""Entry module of a training on many devices: ``deepspeed --module avsr.train CONFIG [key=value ...]``."""

from avsr.training.run import main

if __name__ == "__main__":
    main()
