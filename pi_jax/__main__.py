from pi_jax.cli import main

main()
