"""The structure of the package, read from its source: what may import what, and what no file may contain."""

import ast
import re
import tomllib
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("xpo_jax", "configs", "tools")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text()) for name, path in SOURCES.items()}
PACKAGE = sorted(name for name in SOURCES if name.split(".")[0] == "xpo_jax")
CONFIGS = sorted(name for name in SOURCES if name.startswith("configs."))
# What the wheel has as xpo_jax.tools; the other tools are for developers.
BUILD = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
IN_WHEEL = [ROOT / entry for entry in BUILD["targets"]["wheel"]["only-include"] if entry.startswith("tools/")]
SHARED_TOOLS = {
    name for name, path in SOURCES.items() if any(path.is_relative_to(entry) for entry in IN_WHEEL)
}
# Bottom to top. A room, or a module beside the rooms, imports what stands in lines above its own, and its own room.
ROOMS = [
    ("values", "io", "embedded", "configs"),
    ("runtime",),
    ("models", "checkpointing"),
    ("algorithm",),
    ("config",),
    ("data",),
    ("judges",),
    ("evaluation",),
    ("reporting",),
    ("experiment",),
    ("train", "offline"),
    ("main",),
    ("tools",),
]
FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}
# In the judges' room, but not judges.
SHARED_BY_JUDGES = {
    f"xpo_jax.judges.{part}"
    for part in (
        "answers",
        "ask",
        "cache",
        "completion_parsing",
        "contract",
        "device_model",
        "device_sampler",
        "http_client",
        "http_connection",
        "http_settings",
        "human_board",
        "human_server",
        "limits",
        "paraphrase_gates",
        "prompted_model",
        "prompting",
        "scores",
        "scoring",
        "thinking",
        "voting",
    )
}
JUDGES = sorted(n for n in PACKAGE if n.startswith("xpo_jax.judges.") and n not in SHARED_BY_JUDGES)
# These run a model on the devices, through `device_model`, and otherwise import no more than any judge.
DEVICE_JUDGES = {
    "xpo_jax.judges.llm": {
        "config.schema",
        "judges.device_model",
        "judges.prompted_model",
        "values",
    },
    "xpo_jax.judges.reasoning": {
        "algorithm.sampling",
        "config.schema",
        "io.text",
        "judges.completion_parsing",
        "judges.device_sampler",
        "judges.prompted_model",
        "judges.prompting",
        "judges.voting",
        "models.hf.model_folder",
        "values",
    },
    "xpo_jax.judges.reward": {
        "config.schema",
        "data.chat_templates",
        "judges.contract",
        "judges.device_model",
        "judges.scores",
        "models.hf.hub",
        "models.hf.model_folder",
        "models.hf.tensors",
        "models.registry",
        "values",
    },
}
# Each can be read with no more of the package than this.
LEAVES = {
    "values": set(),
    "io.text": set(),
    "io.files": {"io.text"},
    "config.annotations": set(),
    "config.schema": {"config.annotations", "io.text"},
}


def is_package(name: str) -> bool:
    return SOURCES[name].name == "__init__.py"


def imported(name: str, nodes: Iterator[ast.AST]) -> set[str]:
    """Return dotted names, resolved to modules of the package (`from xpo_jax import losses`, `from . import cli`)."""
    names = set()
    package = name if is_package(name) else name.rpartition(".")[0]
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            full = {f"{base}.{alias.name}" for alias in node.names}
            names |= {name if name in SOURCES else base for name in full}
    return names


# Every import, at the top or inside a function; an import for the type checker alone counts as well.
IMPORTS = {name: imported(name, ast.walk(tree)) for name, tree in TREES.items()}
OURS = {name: {i for i in imports if i in SOURCES} for name, imports in IMPORTS.items()}


def reach(start: str, edges: dict[str, set[str]], *, without: frozenset[str] = frozenset()) -> set[str]:
    """Return the modules that `start` imports, directly or through the package, without looking into `without`."""
    reached, todo = set(), [start]
    while todo:
        new = edges.get(todo.pop(), set()) - reached - without
        reached |= new
        todo += new
    return reached


def top_names(modules: set[str]) -> set[str]:
    return {module.split(".")[0] for module in modules}


def room(name: str) -> str:
    return name.split(".")[1]


def test_every_room_has_a_floor_and_an_introduction():
    assert {room(name) for name in PACKAGE if name != "xpo_jax"} == set(FLOOR)
    folders = {path.parent for name, path in SOURCES.items() if not name.startswith("configs")}
    for folder in folders - {ROOT / "tools", ROOT / "xpo_jax"}:
        introduction = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
        assert introduction, f"{folder}: state what lives here, and in what order to read it"


def test_imports_point_one_way():
    # a package's own __init__ may name its modules
    inner = {name: {i for i in ours if not is_package(i)} for name, ours in OURS.items()}
    assert {name for name in SOURCES if name in reach(name, inner)} == set()
    upward = {
        (name, imported)
        for name in PACKAGE
        for imported in OURS[name]
        if "xpo_jax" not in (name, imported)
        and room(imported) != room(name)
        and FLOOR[room(imported)] >= FLOOR[room(name)]
    }
    assert upward == set()


@pytest.mark.parametrize("name", SOURCES)
def test_import_is_written_out_except_between_tools_of_the_wheel(name):
    """There the tools are xpo_jax.tools, so a full name would be that of a module that is not installed."""
    nodes = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.ImportFrom)]
    if name not in SHARED_TOOLS:
        assert all(node.level == 0 for node in nodes)
        return
    assert not any(
        module.split(".")[0] == "tools" for module in imported(name, [n for n in nodes if not n.level])
    )
    assert {module for module in OURS[name] if module.startswith("tools.")} <= SHARED_TOOLS


def test_each_part_is_read_by_few():
    importers = lambda of: {name for name in [*PACKAGE, *CONFIGS] if of in OURS[name]}  # tools are free
    assert importers("xpo_jax.main") == set()
    loops = {"xpo_jax.train", "xpo_jax.offline"}
    assert all(importers(loop) <= {"xpo_jax.main"} for loop in loops)
    readers = ("startup", "starting_weights", "session", "export", "descriptions", "inputs")
    readers += ("judge_progress", "judged_pairs")
    around = {f"xpo_jax.experiment.{name}" for name in readers}
    assert importers("xpo_jax.experiment.startup") <= loops
    assert importers("xpo_jax.experiment.session") <= {"xpo_jax.experiment.startup", *loops}
    assert importers("xpo_jax.experiment.setup") <= {*around, *loops}
    # a family is reached through the registry, so that adding one is a file and a line
    families = {name for name in OURS["xpo_jax.models.registry"] if name.startswith("xpo_jax.models.")}
    families -= {"xpo_jax.models.family", "xpo_jax.models.lora"}
    assert families == {f"xpo_jax.models.{family}" for family in ("llama", "qwen2", "qwen3")}
    assert all(importers(family) == {"xpo_jax.models.registry"} for family in families)
    # main loads the config, these read it, and a config may name the loader's helpers
    reading = ("startup", "setup", "groups", "data_setup", "descriptions", "inputs", "judge_factory")
    readers = {"xpo_jax.main", *(f"xpo_jax.experiment.{name}" for name in reading)}
    assert importers("xpo_jax.config.loader") <= {*readers, *CONFIGS}
    for leaf, modules in LEAVES.items():
        assert OURS[f"xpo_jax.{leaf}"] == {f"xpo_jax.{module}" for module in modules}, leaf


@pytest.mark.parametrize("name", JUDGES)
def test_judges_stand_alone(name):
    assert {module for module in OURS[name] if module in JUDGES} == set()
    if name in DEVICE_JUDGES:
        modules = {module for module in OURS[name] if not is_package(module)}
        assert modules == {f"xpo_jax.{part}" for part in DEVICE_JUDGES[name]}
        assert not top_names(IMPORTS[name]) & {"jax", "flax"}  # arrays are the business of `device_model`
        return
    # values names the array type for annotations; a judge gets text and rows
    assert not top_names(reach(name, IMPORTS, without=frozenset({"xpo_jax.values"}))) & {"jax", "flax"}


def test_what_each_part_must_not_know():
    assert not [name for name in reach("xpo_jax.algorithm.losses", OURS) if name.startswith("xpo_jax.models")]
    assert not top_names(reach("xpo_jax.algorithm.sampler", IMPORTS)) & {"tokenizers", "transformers"}
    assert not reach("xpo_jax.judges.device_model", OURS) & set(JUDGES)
    sources = {name.removeprefix("xpo_jax.") for name in OURS["xpo_jax.data.sources"]} - {"data"}
    assert sources == {
        "data.folders",
        "data.formats",
        "data.rows",
        "config.schema",
        "io.copies",
        "io.user_paths",
    }
    assert OURS["xpo_jax.data.formats"] == {
        "xpo_jax.data.compression",
        "xpo_jax.data.indexed_lines",
        "xpo_jax.data.rows",
        "xpo_jax.io.copies",
        "xpo_jax.io.text",
    }
    for name in PACKAGE:
        assert not top_names(IMPORTS[name]) & {"torch", "tools", "tests", "configs"}, name


# Beside a family's own file and its line in the registry: the planner's table of published models, a client of another
# library, and the tools that made the embedded and golden models.
NAME_FAMILIES = ("xpo_jax.models.qwen2", "tools.planner.hardware", "tools.bench.trl_worker", "tools.build.")


def words(name: str) -> Iterator[str]:
    """Yield the identifiers and strings of a file, without its docstrings."""
    nodes = list(ast.walk(TREES[name]))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {ast.get_docstring(node, clean=False) for node in nodes if isinstance(node, documented)}
    for node in nodes:
        fields = [getattr(node, field, None) for field in ("id", "attr", "name", "module", "value")]
        yield from (word for word in fields if isinstance(word, str) and word not in docstrings)


@pytest.mark.parametrize("name", [n for n in SOURCES if not n.startswith(("configs", *NAME_FAMILIES))])
def test_model_family_is_named_by_the_registry_alone(name):
    named = [word for word in words(name) if re.search(r"qwen2(?!\.5)", word, re.IGNORECASE)]
    assert named == (["qwen2"] * 3 if name == "xpo_jax.models.registry" else [])  # its import and its line


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_only_a_config(name):
    assert IMPORTS[name] <= {"__future__", "ml_collections", "xpo_jax.config.loader"}


def test_a_wrong_command_line_is_answered_before_jax_loads():
    at_once = {name: imported(name, iter(tree.body)) for name, tree in TREES.items()}
    assert not top_names(reach("xpo_jax.main", at_once)) & {"jax", "flax", "transformers", "datasets"}


FUNCTION_LINES, CONSTRUCTOR_ARGUMENTS, MODULE_LINES = 80, 8, 300


def fields(node: ast.ClassDef) -> int:
    """Count the arguments that a class takes: of its __init__, or the fields of a dataclass or NamedTuple."""
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and method.name == "__init__":
            arguments = method.args
            return len(arguments.posonlyargs + arguments.args + arguments.kwonlyargs) - 1
    heads = " ".join(ast.unparse(part) for part in [*node.decorator_list, *node.bases])
    if not re.search(r"\bdataclass\b|\bNamedTuple\b", heads):
        return 0
    return sum(isinstance(statement, ast.AnnAssign) for statement in node.body)


def gives_a_reason(node: ast.AST, lines: list[str]) -> bool:
    """Return whether `# long: why` is right below the docstring of a module, class or function, or below its header."""
    body = node.body
    documented = ast.get_docstring(node, clean=False) is not None
    start = body[0].end_lineno if documented else getattr(node, "lineno", 0)
    after = body[1:] if documented else body
    end = after[0].lineno if after else len(lines)
    return any(re.match(r"\s*# long: \S", line) for line in lines[start : end - 1])


def oversized(name: str) -> dict[str, str]:
    """Return what is too large in a file and gives no reason (module, functions, classes), with its size."""
    lines, large = SOURCES[name].read_text().splitlines(), {}
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Module) and len(lines) > MODULE_LINES:
            large[node] = (name, f"{len(lines)} lines")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            if length > FUNCTION_LINES:
                large[node] = (f"{name}.{node.name}", f"{length} lines")
        elif isinstance(node, ast.ClassDef) and fields(node) > CONSTRUCTOR_ARGUMENTS:
            large[node] = (f"{name}.{node.name}", f"{fields(node)} arguments")
    return {at: size for node, (at, size) in large.items() if not gives_a_reason(node, lines)}


@pytest.mark.parametrize("name", SOURCES)
def test_module_function_and_constructor_beyond_its_limit_gives_a_reason(name):
    unexplained = oversized(name)
    assert unexplained == {}, (
        "split it along a seam that has a name, or write `# long: why` below its docstring"
    )


def test_limit_is_measured_and_a_reason_lifts_it():
    source = '''"""A module."""

# long: a table
import a

def f(x):
    """Return x."""
    # long: why
    return x

class C:
    # it is long: but not said in the agreed form
    def g(self): return 1
'''
    reasons = {
        getattr(node, "name", "module"): gives_a_reason(node, source.splitlines())
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)
    }
    assert reasons == {"module": True, "f": True, "C": False, "g": False}
    for text, count in (
        ("class A:\n    def __init__(self, a, *, b, c=1): pass", 3),
        ("@dataclasses.dataclass(frozen=True)\nclass A:\n    a: int\n    b: int = 1", 2),
        ("class A(NamedTuple):\n    a: int\n    def f(self): pass", 1),
        ("class A:\n    a: int", 0),
    ):
        assert fields(ast.parse(text).body[0]) == count


@pytest.mark.parametrize("name", PACKAGE)
def test_public_names_are_documented(name):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    public = [node for node in TREES[name].body if isinstance(node, kinds) and node.name[0] != "_"]
    assert [node.name for node in public if not ast.get_docstring(node)] == []
    assert not TREES[name].body or ast.get_docstring(TREES[name]), "a module says what it does"


def texts() -> dict[str, str]:
    """Return every text file of the repository except this one, which has to name what it forbids."""
    folders = (".ci", "configs", "docs", "tests", "tools", "xpo_jax")
    files = [path for path in ROOT.iterdir() if path.suffix in {".md", ".toml", ".txt"}] + [ROOT / "Makefile"]
    files += [path for folder in folders for path in (ROOT / folder).rglob("*")]
    kinds = {".py", ".md", ".toml", ".txt", ".json", ".sh", ".yaml", ".yml", ""}
    return {
        str(path.relative_to(ROOT)): path.read_text()
        for path in files
        if path.is_file() and path.suffix in kinds and path != Path(__file__)
    }


TEXTS = texts()


@pytest.mark.parametrize(
    ("what", "pattern"),
    [
        ("the address of a package index", r"index-url|pypi\.org|pythonhosted|https?://\S*/simple\b"),
        ("a path of one machine", r"(?<![\w.])/(work|root|home|tmp)/"),
        ("code that runs what it reads", r"\bpickle\b|(?<![\w.])eval\(|trust_remote_code\s*=\s*True"),
    ],
)
def test_stands_in_no_file(what, pattern):
    matches = {name: match.group() for name, text in TEXTS.items() if (match := re.search(pattern, text))}
    assert matches == {}, f"no file may hold {what}"


DOCUMENTS = sorted(name for name in TEXTS if name.endswith(".md"))
FILES = {name for name in TEXTS if name.endswith(".py")} | {f"tests/{Path(__file__).name}"}
# Names of files that belong to a reader, in examples.
EXAMPLES = re.compile(r"(my_\w+|path|file)\.py")


def anchors(document: Path) -> set[str]:
    """Return the anchors that GitHub gives to a document's headings."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_relative_link_leads_to_a_file_and_heading(name):
    broken = []
    for target in re.findall(r"\]\((?!\w+://)([^)\s]+)\)", TEXTS[name]):
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


def test_named_command_exists():
    commands = {
        name: set(re.findall(r"-m ((?:xpo_jax|tools)(?:\.\w+)*)", text)) - {"tools.build.NAME"}
        for name, text in TEXTS.items()
    }
    run = {
        name.removesuffix(".__main__")
        for name in SOURCES
        if name.endswith("__main__") or not is_package(name)
    }
    run |= {f"xpo_jax.{name.removesuffix('.__main__')}" for name in SHARED_TOOLS if name != "tools.cli"}
    assert {name: modules - run for name, modules in commands.items() if modules - run} == {}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_named_python_file_exists(name):
    named = set(re.findall(r"(?<![\w/.])(?:\w+/)*\w+\.py\b", TEXTS[name]))
    known = {
        file for path in FILES for file in (path, *(path[i + 1 :] for i, c in enumerate(path) if c == "/"))
    }
    assert {file for file in named if file not in known and not EXAMPLES.fullmatch(file)} == set()
