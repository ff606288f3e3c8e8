"""`qtool init` and `qtool recipes`: a first recipe, those that ship, every key."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from qtool import QtoolError
from qtool.cli.options import write_text


@click.command()
@click.argument("model", required=False)
@click.option(
    "--method", "methods", default="", help="awq, gptq, nf4, gguf, or formats such as Q5_K_M; comma-separated."
)
@click.option("--card", help="Where it will be served, or `cpu` (default: this machine's card, else its processor).")
@click.option("--revision", help="The Hub model's revision.")
@click.option("--out", default="recipe.yaml", show_default=True, help="The file to write; - prints it.")
@click.option("--force", is_flag=True, help="Replace a file that is there.")
def init(model: str | None, methods: str, card: str | None, revision: str | None, out: str, force: bool) -> None:
    """Write a recipe for MODEL (a folder or a Hub id) that will run here, with the reason of every choice beside it.

    Only headers are read: no weight, no download of one. Asks for what is missing on a terminal, never elsewhere.

    \b
    Examples:
      qtool init ./My-Model
      qtool init Qwen/Qwen2.5-Coder-1.5B-Instruct --card L40S --method awq,gptq
      qtool init qtool-demo --out - > demo.yaml
    """
    asks = model is None and sys.stdin.isatty() and sys.stdout.isatty()
    if model is None:
        if not asks:
            raise QtoolError("name a model: `qtool init ./My-Model`, or `qtool init qtool-demo`, which ships here.")
        model = str(click.prompt("Model (a folder or a Hub id)", default="qtool-demo"))
    path = None if out == "-" else Path(out)
    if path is not None and path.is_dir():
        raise QtoolError(f"--out {path}: is a folder; name a file in it: {path / 'recipe.yaml'}.")
    if path is not None and path.exists() and not force:
        raise QtoolError(f"{path}: is there already. --out names another file, --force replaces it.")
    from qtool.recipe.sections import checked_recipe
    from qtool.recipe.yaml_file import parse_yaml
    from qtool.starter import default_format, formats_of, look, write_starter

    seen = look(model, card, revision)
    named = [name.strip() for name in methods.split(",") if name.strip()]
    if methods and not named:
        raise QtoolError(f"--method {methods!r}: names none.")
    if asks and not named:
        taken = default_format(seen.card)
        named = [str(click.prompt(f"Format (awq, gptq, nf4, Q4_K_M, …) for {seen.card.name}", default=taken))]
    made = write_starter(seen, formats_of(named, seen.card))
    checked_recipe(parse_yaml(made.text, out), out)
    if path is None:
        click.echo(made.text, nl=False)
        return
    write_text(path, made.text)
    click.echo(f"{path}: written. It says why it is so; change what you like.")
    for line in made.missing:
        click.echo(f"first: {line}")
    click.echo(f"next: qtool run {path} --dry-run")


def complete_recipe(context: click.Context, parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """Names of recipes that ship; the shell adds files."""
    from qtool.recipe.paths import about, shipped_recipes

    found = [(name, path) for name, path in shipped_recipes().items() if name.startswith(begun)]
    return [CompletionItem(name, help=about(path)) for name, path in found] + [CompletionItem(begun, type="file")]


@click.command()
@click.argument("name", required=False, shell_complete=complete_recipe)
@click.option("--keys", is_flag=True, help="Every key of a recipe: type, default, meaning.")
@click.option("--schema", is_flag=True, help="The JSON schema of recipes, for editors.")
def recipes(name: str | None, keys: bool, schema: bool) -> None:
    """List the recipes that ship with qtool, or print the one called NAME.

    \b
    Examples:
      qtool recipes
      qtool recipes awq > my-recipe.yaml
      qtool recipes --keys | less
      qtool recipes --schema > recipe.schema.json
    """
    if keys or schema:
        from qtool.recipe.reference import markdown, schema_text

        click.echo(schema_text() if schema else markdown(), nl=False)
        return
    from qtool.recipe.paths import about, locate, shipped_recipes

    if name is not None:
        click.echo(locate(Path(name)).read_text(encoding="utf-8"), nl=False)
        return
    from qtool.report.columns import print_list

    print_list([(name, about(path)) for name, path in shipped_recipes().items()])
    click.echo("\nqtool run NAME                          runs one")
    click.echo("qtool run NAME --set model=./My-Model   on your model")
    click.echo("qtool recipes NAME > my.yaml            prints it")
    click.echo("qtool init ./My-Model                   writes one for your model and card")
