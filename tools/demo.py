"""Trains a V-MoE on handwritten digits, evaluates it and draws where its experts look. Needs no download."""

from vmoe.cli.demo import main

raise SystemExit(main())
