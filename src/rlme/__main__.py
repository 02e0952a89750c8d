"""`python -m rlme` is `rlme`; launchers such as `accelerate launch -m rlme` need it."""

from rlme.cli import main

main()
