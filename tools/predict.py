"""Name what is in pictures: `python tools/predict.py MODEL IMAGE_OR_FOLDER...`; --help tells more."""

from vmoe.cli.predict import main

raise SystemExit(main())
