"""An invalid recipe is rejected before anything starts, with the dotted name of the field and advice."""

import pytest

from lsmix.data.errors import MissingError, RecipeError
from lsmix.pipeline.config.recipe import read_recipe
from lsmix.pipeline.config.recipes import builtin_recipes, recipe_path, recipe_text
from lsmix.pipeline.stages.graph import build_graph
from lsmix.pipeline.workspace.workspace import Workspace


@pytest.mark.parametrize(
    ("override", "message"),
    [
        # Unknown keys: the message suggests the most similar key.
        ("flwo.steps=3", r"unknown key 'flwo'\. Did you mean 'flow'\?"),
        ("data.limmit=3", r"unknown key 'data\.limmit'\. Did you mean 'limit'\?"),
        ("flow.stepps=3", r"unknown key 'flow\.stepps'\. Did you mean 'steps'\?"),
        ("flow.training.iterrations=3", r"unknown key 'flow\.training\.iterrations'\. Did you mean 'iterations'\?"),
        ("latents.sead=1", r"unknown key 'latents\.sead'\. Did you mean 'seed'\?"),
        ("pools.lsmix.alpah=1", r"unknown key 'pools\.lsmix\.alpah'\. Did you mean 'alpha'\?"),
        ("classifier.widht=3", r"unknown key 'classifier\.widht'\. Did you mean 'width'\?"),
        ("runs.lsmix.poool='x'", r"unknown key 'runs\.lsmix\.poool'\. Did you mean 'pool'\?"),
        ("runs.lsmix.classifier.epoch=3", r"runs\.lsmix\.classifier: unknown key 'epoch'\. Did you mean 'epochs'\?"),
        ("report.titel='x'", r"unknown key 'report\.titel'\. Did you mean 'title'\?"),
        # Values out of range.
        ("pools.lsmix.alpha=0", r"pools\.lsmix\.alpha: expected float > 0\.0, got 0"),
        ("pools.lsmix.alpha=-0.5", r"pools\.lsmix\.alpha: expected float > 0\.0, got -0\.5"),
        ("pools.lsmix.alpha=nan", r"pools\.lsmix\.alpha: expected a finite number, got nan"),
        ("pools.lsmix.alpha=inf", r"pools\.lsmix\.alpha: expected a finite number, got inf"),
        ("pools.lsmix.alpha='a'", r"pools\.lsmix\.alpha: expected float, got str"),
        ("pools.zero.lambdas=[0.5, 1.5]", r"pools\.zero\.lambdas\[1\]: expected float <= 1\.0, got 1\.5"),
        ("pools.zero.lambdas=[-0.1]", r"pools\.zero\.lambdas\[0\]: expected float >= 0\.0, got -0\.1"),
        ("pools.zero.lambdas=[nan]", r"pools\.zero\.lambdas\[0\]: expected a finite number, got nan"),
        ("pools.lsmix.batch_size=0", r"pools\.lsmix\.batch_size: expected int >= 1, got 0"),
        ("pools.lsmix.batch_size=1000000000", r"pools\.lsmix\.batch_size: expected int <= 65536"),
        ("pools.lsmix.seed=9223372036854775808", r"pools\.lsmix\.seed: expected an integer of at most"),
        ("pools.lsmix=3", r"pools\.lsmix: expected a section, got int"),
        ("pools=[]", r"pools: expected a section, got array"),
        ("flow.levels=0", r"flow\.levels: expected int >= 1, got 0"),
        ("flow.training.learning_rate=0.0", r"flow\.training\.learning_rate: expected float > 0\.0, got 0\.0"),
        ("flow.training.iterations=0", r"flow\.training\.iterations: expected int >= 1, got 0"),
        ("data.heldout=-1", r"data\.heldout: expected int >= 0, got -1"),
        ("data.path='a\\u0000b'", r"data\.path: expected text"),
        ("classifier.epochs=0", r"classifier\.epochs: expected int >= 1, got 0"),
        ("runs.lsmix.classifier.epochs=0", r"runs\.lsmix\.classifier: epochs: expected int >= 1, got 0"),
        ("runs.baseline.seeds=[]", r"runs\.baseline\.seeds: expected array of length >= 1, got \[\]"),
        ("runs.baseline.seeds=[1, 1]", r"runs\.baseline\.seeds: list each seed only once, got \[1, 1\]"),
        ("name='a/b'", r"name: a name may contain letters, .* Got 'a/b'"),
        ("name='a\\n'", r"name: a name may contain"),
        ("pools.a/b={alpha = 1}", r"pools: a name may contain letters"),
        # A misspelt name must not add a section.
        (
            "pools.lsmx.alpha=0.3",
            r"'--set pools\.lsmx\.alpha=0\.3': there is no pool 'lsmx'\. .* Did you mean 'lsmix'\?",
        ),
        ("runs.basline.seeds=[1]", r"there is no run 'basline'\. .* Did you mean 'baseline'\?"),
        ("scale.small.data.limit=3", r"there is no scale 'small'\. The recipe has: none"),
        # Impossible mixes.
        ("pools.lsmix.method=lsmix", r"pools\.lsmix\.method: unknown mixing method 'lsmix'\. Did you mean 'ls-mix'\?"),
        ("pools.lsmix.sources=9", r"pools\.lsmix\.sources: expected int <= 8, got 9"),
        ("pools.zero.sources=3", r"pools\.zero\.lambdas: fixed λ work with two sources only"),
        ("pools.lsmix.corner=middle", r"pools\.lsmix\.corner: "),
        (
            'pools.p={ method = "linear", sources = 3 }',
            r"pools\.p\.sources: only 'ls-mix' can mix more than two sources",
        ),
        ('pools.p={ method = "cutmix", corner = "random" }', r"pools\.p\.corner: only methods in latent space"),
        ('pools.p={ method = "mixup", flow = "x" }', r"pools\.p\.flow: 'mixup' mixes pixels and needs no flow"),
        ('runs.r={ mix = [{ method = "mixpu" }] }', r"runs\.r\.mix\[0\]\.method: .*Did you mean 'mixup'\?"),
        ('runs.r={ mix = [{ method = "ls-mix" }] }', r"runs\.r\.mix\[0\]\.method: 'ls-mix' mixes in latent space"),
        ('runs.r={ mix = [{ pool = "nope" }] }', r"runs\.r\.mix\[0\]\.pool: there is no pool 'nope'"),
        ("runs.r={ mix = [{}] }", r"runs\.r\.mix\[0\]: expected either a 'pool' or a 'method'"),
        ('runs.r={ mix = [{ method = "mixup", weight = 0 }] }', r"runs\.r\.mix\[0\]\.weight: expected float > 0"),
        ('runs.lsmix.mix=[{ method = "mixup" }]', r"runs\.lsmix\.mix: 'pool' and 'mix' cannot be combined"),
        (
            'runs.r={ mix = [{ method = "mixup" }, { pool = "zero" }], mode = "chain" }',
            r"runs\.r\.mix\[1\]\.pool: in a chain, a pool must come first",
        ),
    ],
)
def test_a_wrong_field_is_rejected_by_its_dotted_name(tiny_recipe, override, message):
    override = override.replace("'", '"')  # basic TOML strings, in which escapes count
    with pytest.raises(RecipeError, match=message):
        read_recipe(tiny_recipe, [override])


def test_a_run_on_an_unknown_pool_lists_the_known_pools(tiny_recipe):
    with pytest.raises(
        RecipeError, match=r"runs\.lsmix\.pool: there is no pool 'lsmx'\. .* lsmix, zero\. Did you mean"
    ):
        read_recipe(tiny_recipe, ["runs.lsmix.pool=lsmx"])


def test_a_seed_in_the_wrong_place_is_rejected_because_it_would_be_ignored(tiny_recipe):
    with pytest.raises(RecipeError, match=r"runs\.NAME\.seeds"):
        read_recipe(tiny_recipe, ["classifier.seed=3"])
    with pytest.raises(RecipeError, match=r"use 'runs\.lsmix\.seeds' instead"):
        read_recipe(tiny_recipe, ["runs.lsmix.classifier.seed=3"])


@pytest.mark.parametrize("override", ["flow.path=nowhere", "pools.lsmix.flow=nowhere"])
def test_an_unknown_flow_is_named(tiny_recipe, tmp_path, override):
    recipe = read_recipe(tiny_recipe, [override])
    with pytest.raises(MissingError, match=r"flow 'nowhere' does not exist, .* nor as a flow in .* \(none\)"):
        build_graph(recipe, Workspace(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name = ", r"is not valid TOML"),
        (b"\x00\x01", r"is not valid TOML"),
        (b"name = '\xff'", r"is not valid TOML"),
        (b"x = " + b"[" * 100_000, r"is not valid TOML: it is nested too deeply"),
        (b"x = " + b"9" * 5000, r"is not valid TOML"),
        # Without a limit on dots, tomllib needs tens of gigabytes for this.
        (b".".join([b"a"] * 100_000) + b" = 1", r"is not valid TOML: it has more than 4,096 dots"),
        (b"# " + b"x" * (1 << 20), r"has 1\.0 MB; the limit is 1\.0 MB"),
        (b'[data]\nformat = "digits"', r"the key 'name' is missing"),
        (b'name = "x"', r"the key 'data' is missing"),
        (b'format = 2\nname = "x"\nfuture = 1', r"has format 2; this version of lsmix reads format 1\. Use a newer"),
    ],
    ids=lambda value: value[:12] if isinstance(value, str) else "",
)
def test_a_file_that_is_not_a_recipe_is_rejected_in_one_sentence(tmp_path, content, message):
    path = tmp_path / "my.toml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=message) as caught:
        read_recipe(path)
    assert "\n" not in str(caught.value)


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(
        MissingError, match=r"nothing\.toml' does not exist\. Write one with 'lsmix init NAME > my\.toml'"
    ):
        read_recipe(tmp_path / "nothing.toml")


@pytest.mark.parametrize(
    ("override", "get", "expected"),
    [
        ("pools.lsmix.alpha=1", lambda r: r.pools["lsmix"].alpha, 1.0),
        (" pools . lsmix . alpha =0.25", lambda r: r.pools["lsmix"].alpha, 0.25),
        ("pools.new={alpha = 0.3}", lambda r: r.pools["new"].alpha, 0.3),
        ("pools.zero.lambdas=[0.5]", lambda r: r.pools["zero"].lambdas, (0.5,)),
        ("flow.training.flip=true", lambda r: r.flow.training.flip, True),
        ("report.title=a = b", lambda r: r.report.title, "a = b"),
    ],
)
def test_set_accepts_toml_values_and_bare_words(tiny_recipe, override, get, expected):
    assert get(read_recipe(tiny_recipe, [override])) == expected


@pytest.mark.parametrize("override", ["alpha", "=1", "pools..alpha=1", "", ".=1"])
def test_set_without_a_key_and_a_value_is_rejected(tiny_recipe, override):
    with pytest.raises(RecipeError, match=r"expected 'section\.key=value', such as"):
        read_recipe(tiny_recipe, [override])


def test_set_below_a_value_is_rejected(tiny_recipe):
    with pytest.raises(RecipeError, match=r"'--set name\.x=1': 'name' is a value, not a section"):
        read_recipe(tiny_recipe, ["name.x=1"])


def test_relative_paths_start_at_the_recipe_but_in_set_at_the_current_folder(tmp_path, monkeypatch):
    home, here = tmp_path / "home", tmp_path / "here"
    for folder in (home, here):
        (folder / "flow").mkdir(parents=True)
    path = home / "my.toml"
    path.write_text('name = "x"\n[data]\npath = "images"\n[flow]\npath = "flow"\n[pools.p]\nflow = "flow"\n')
    monkeypatch.chdir(here)
    recipe = read_recipe(path)
    assert recipe.data.path == str(home / "images")
    assert recipe.flow.path == recipe.pools["p"].flow == str(home / "flow")
    # Overriding another field of the same section must not change the recipe's own path.
    assert read_recipe(path, ["data.limit=3", "flow.steps=2"]).flow.path == str(home / "flow")
    assert read_recipe(path, ["data.path=images"]).data.path == str(here / "images")
    assert read_recipe(path, ["pools.p.flow=flow"]).pools["p"].flow == str(here / "flow")


def test_a_path_may_start_at_the_home_folder_and_a_flow_may_be_a_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "my.toml"
    path.write_text('name = "x"\n[data]\npath = "~/images"\n[flow]\npath = "some-flow"\n')
    recipe = read_recipe(path)
    assert recipe.data.path == str(tmp_path / "images")
    assert recipe.flow.path == "some-flow"


@pytest.mark.parametrize("name", builtin_recipes())
def test_every_built_in_recipe_is_valid(name):
    assert read_recipe(recipe_path(name)).name
    assert recipe_text(name).startswith("#")


def test_an_unknown_built_in_recipe_lists_the_available_ones():
    with pytest.raises(RecipeError, match=r"no built-in recipe 'dmeo'\. Did you mean 'demo'\? Available: "):
        recipe_path("dmeo")


SIZED = """
name = "sized"
[data]
format = "digits"
[mix]
copies = 9
alpha = 0.3
[pools.one]
[pools.two]
alpha = 0.7
[runs.baseline]
[scale.small.data]
limit = 50
[scale.small.mix]
copies = 2
[scale.small.pools.two]
alpha = 0.8
"""


@pytest.fixture
def sized(tmp_path):
    path = tmp_path / "sized.toml"
    path.write_text(SIZED, encoding="utf-8")
    return path


def test_pools_share_the_fields_of_mix_and_keep_their_own(sized):
    pools = read_recipe(sized).pools
    assert [(pool.copies, pool.alpha) for pool in pools.values()] == [(9, 0.3), (9, 0.7)]
    assert read_recipe(sized, ["mix.copies=4"]).pools["one"].copies == 4


def test_a_scale_overrides_the_recipe_and_set_overrides_both(sized):
    small = read_recipe(sized, scale="small")
    assert small.data.limit == 50
    assert [(pool.copies, pool.alpha) for pool in small.pools.values()] == [(2, 0.3), (2, 0.8)]
    assert read_recipe(sized).data.limit == 0
    assert read_recipe(sized, ["data.limit=60"], scale="small").data.limit == 60


def test_an_unknown_scale_lists_the_available_ones(sized, tiny_recipe):
    with pytest.raises(RecipeError, match=r"has no scale 'smal'\. Available: small\. Did you mean 'small'\?"):
        read_recipe(sized, scale="smal")
    with pytest.raises(RecipeError, match=r"has no scale 'small'\. Available: none"):
        read_recipe(tiny_recipe, scale="small")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("scale.small.data.limmit=3", r"scale 'small': unknown key 'data\.limmit'\. Did you mean 'limit'\?"),
        ("scale.small=3", r"scale\.small: expected a section, got 3|scale\.small: expected a section"),
        ("scale.small.data.limit=-1", r"scale 'small': data\.limit: expected int >= 0, got -1"),
    ],
)
def test_an_invalid_scale_is_rejected_even_if_it_is_not_used(sized, override, message):
    key, _, value = override.rpartition("=")
    *section, name = key.split(".")
    text = SIZED if name != "small" else SIZED.partition("[scale")[0]
    header = f"[{'.'.join(section)}]"
    text = (
        text.replace(header, f"{header}\n{name} = {value}") if header in text else f"{text}{header}\n{name} = {value}\n"
    )
    sized.write_text(text.replace("limit = 50\n", "") if name == "limit" else text, encoding="utf-8")
    with pytest.raises(RecipeError, match=message):
        read_recipe(sized)


@pytest.mark.parametrize("name", [name for name in builtin_recipes() if name.startswith(("table", "naturalness"))])
def test_every_recipe_of_the_paper_has_a_small_scale_with_the_same_runs(name):
    full, small = read_recipe(recipe_path(name)), read_recipe(recipe_path(name), scale="small")
    assert list(small.runs) == list(full.runs)
    assert list(small.pools) == list(full.pools)
    assert small.data.limit <= 5000


@pytest.mark.parametrize("name", ["table1-cifar10", "table3-cifar10", "table4-cifar10"])
def test_the_desk_scale_has_the_same_runs_with_five_seeds(name):
    full, desk = read_recipe(recipe_path(name)), read_recipe(recipe_path(name), scale="desk")
    assert {run: section.label for run, section in desk.runs.items()} == {
        run: section.label for run, section in full.runs.items()
    }
    assert {section.seeds for section in desk.runs.values()} == {(0, 1, 2, 3, 4)}
    assert desk.pools.keys() == full.pools.keys()


def test_learning_curves_have_equal_budgets():
    scales = [read_recipe(recipe_path("learning-curve-cifar10"), scale=f"images-{n}") for n in (500, 1000, 2000, 4000)]
    assert {recipe.data.limit * recipe.classifier.epochs for recipe in scales} == {100_000}


def test_a_recipe_without_latents_has_no_flow(tiny_recipe, tmp_path):
    recipe = read_recipe(tiny_recipe)
    assert "train-glow" in {node.stage.name for node in build_graph(recipe, Workspace(tmp_path))}
    path = tmp_path / "pixels.toml"
    path.write_text('name = "p"\n[data]\nformat = "digits"\n[pools.p]\nmethod = "mixup"\n[runs.r]\npool = "p"\n')
    assert [node.stage.name for node in build_graph(read_recipe(path), Workspace(tmp_path))] == [
        "ingest",
        "mix",
        "train",
        "report",
    ]
