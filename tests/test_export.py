"""The command line of export.py; the export itself is tested in tests/model."""

import pytest

from export import main
from tests.model.networks import spec, write_run, write_small_run


def test_huggingface_folder(tmp_path, monkeypatch, capsys):
    write_small_run(tmp_path / "run")
    (tmp_path / "out").mkdir()  # an empty folder may be filled
    command = ["export.py", str(tmp_path / "run"), str(tmp_path / "out"), "--format", "huggingface"]
    monkeypatch.setattr("sys.argv", command)
    main()
    printed = capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").is_file() and str(tmp_path / "out") in printed
    assert "To let timm load simclr_resnet18, `pip install streamclr`" in printed
    with pytest.raises(SystemExit) as exit:  # a text exit status: Python prints it to stderr and exits with 1
        main()
    assert str(exit.value).startswith("error: ") and "already exists" in str(exit.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "use export.py RUN OUT"),
        ("run", "use export.py RUN OUT"),
        ("run out --fromat timm", "no option '--fromat' (did you mean --format?)"),
        ("run out --format tim", "(did you mean timm?)"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["export.py", *arguments.split()])
    with pytest.raises(SystemExit) as exit:
        main()
    assert message in str(exit.value) and "\n" not in str(exit.value)
    assert capsys.readouterr().err == ""


def test_architectures_of_timm_need_no_import(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "run", spec("resnet18", 96), 96)
    monkeypatch.setattr("sys.argv", ["export.py", str(tmp_path / "run"), str(tmp_path / "out.safetensors")])
    main()
    assert capsys.readouterr().out == f"timm: {tmp_path / 'out.safetensors'}\n"
