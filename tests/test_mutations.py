"""`python tests/mutations.py` takes minutes; that it still finds what it breaks is seen here."""

from mutations import FOLDERS, MUTATIONS, ROOT, TESTS


def test_every_mutation_finds_its_place_and_its_tests():
    gone = [each.name for each in MUTATIONS if (ROOT / each.file).read_text(encoding="utf-8").count(each.old) != 1]
    assert not gone, "mend tests/mutations.yaml"
    assert all((ROOT / "tests" / FOLDERS[kind] / f"{name}.py").exists() for kind in TESTS for name in TESTS[kind])
