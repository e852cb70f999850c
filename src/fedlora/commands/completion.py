"""Runs `fedlora completion`: what a shell completes, as a script that needs no Python when it runs.

The script is made from what every verb says it takes (`SYNTAX`) and from the schema of a
configuration, and holds all of it: pressing the tab key starts no process.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from fedlora.commands import VERBS
from fedlora.commands.json_lines import Emit
from fedlora.config.arguments import TRUTH, Option, Syntax
from fedlora.config.config import Config
from fedlora.config.keys import Mark, Schema, Words, annotation_of, keys_marked
from fedlora.config.schema import config_schema
from fedlora.errors import InputError

SHELLS = ("bash", "zsh", "fish")

HELP = """\
fedlora completion bash|zsh|fish [--json]

Prints a script that completes verbs, options, configuration keys, their values and paths. It is
made for this version; make it again after an update.

  bash   fedlora completion bash > ~/.local/share/bash-completion/completions/fedlora
         (where bash-completion is not installed: into ~/.fedlora-completion.bash, and add
         `source ~/.fedlora-completion.bash` to ~/.bashrc)
  zsh    fedlora completion zsh > "${fpath[1]}/_fedlora"     # with compinit in ~/.zshrc
  fish   fedlora completion fish > ~/.config/fish/completions/fedlora.fish

  --json   one JSON object: shell, script
"""
SYNTAX = Syntax(first=Option("a shell", values=SHELLS))

EVERY_VERB = {
    "json": Option("output for programs", flag=True),
    "help": Option("more on the verb", flag=True),
}


@dataclass(frozen=True)
class Verb:
    """A verb as shells see it: what is done in one line, what stands first, its options."""

    about: str
    first: Option | None
    options: Mapping[str, Option]


def verb(arguments: list[str], emit: Emit | None = None) -> int:
    """`fedlora completion`."""
    if len(arguments) != 1 or arguments[0] not in SHELLS:
        got = " ".join(arguments) or "nothing"
        raise InputError(f"completion: {got}: expected one of {', '.join(SHELLS)}")
    script = {"bash": bash, "zsh": zsh, "fish": fish}[arguments[0]](known_verbs())
    if emit:
        emit({"event": "completion", "shell": arguments[0], "script": script})
    else:
        print(script, end="")
    return 0


# --- what there is to complete ---


def known_verbs() -> dict[str, Verb]:
    """Every verb with all that it takes."""
    keys = configuration_keys()
    out = {}
    for name, home in VERBS.items():
        module = import_module(home)
        syntax: Syntax = module.SYNTAX
        options = {**syntax.options, **(keys if syntax.keys else {}), **EVERY_VERB}
        about = (module.__doc__ or "").splitlines()[0].partition(": ")[2].rstrip(".")
        out[name] = Verb(about, syntax.first, options)
    return out


def configuration_keys() -> dict[str, Option]:
    """The keys of a configuration as options, with the words that may be given."""
    schemas = config_schema()["properties"]
    files, directories = keys_marked(Config, Mark.FILE), keys_marked(Config, Mark.DIRECTORY)
    return {
        key: Option(
            str(schema["description"]),
            many=any(kind.get("type") == "array" for kind in _alternatives(schema)),
            values=_words(key, schema),
            path="file" if key in files else "directory" if key in directories else "",
        )
        for key, schema in schemas.items()
        if key != "method_options"
    }


def _alternatives(schema: Schema) -> list[Schema]:
    """The forms that a value may have."""
    return list(schema.get("anyOf", [schema]))


def _words(key: str, schema: Schema) -> tuple[str, ...]:
    """The words to offer as a key's value."""
    declared = annotation_of(Config, key, Words) if key in Config.model_fields else None
    if declared:
        return declared.words
    words: list[str] = []
    for form in _alternatives(schema):
        words += [x for x in (*form.get("enum", ()), form.get("const")) if isinstance(x, str)]
        words += TRUTH if form.get("type") == "boolean" else ()
    if words == ["none"]:  # that a key may be left out is no choice to offer
        return ()
    return tuple(dict.fromkeys(words))


# --- bash ---

_BASH = r"""# bash completion for fedlora; made by `fedlora completion bash`
_fedlora_options() {
    case $1 in
@OPTIONS@
    esac
}

# kind of what follows an option: flag, one or many; path; words
_fedlora_value() {
    kind=one path= words=
    case $1/$2 in
@VALUES@
    esac
}

_fedlora_complete_path() {
    local found
    while IFS= read -r found; do
        COMPREPLY+=("$found")
    done < <(if [[ $1 == directory ]]; then compgen -d -- "$2"; else compgen -f -- "$2"; fi)
    # From bash 4 on: a slash after directories, quotes where a name needs them.
    type compopt >/dev/null 2>&1 && compopt -o filenames 2>/dev/null
}

_fedlora() {
    local cur verb word key= given=0 i kind path words used=" " all=
    COMPREPLY=()
    cur=${COMP_WORDS[COMP_CWORD]}
    if ((COMP_CWORD == 1)); then
        COMPREPLY=($(compgen -W "@VERBS@ --help --version" -- "$cur"))
        return
    fi
    verb=${COMP_WORDS[1]}
    # The option in front of the cursor and how many values it has; `=` is a word of its own.
    for ((i = 2; i < COMP_CWORD; i++)); do
        word=${COMP_WORDS[i]}
        if [[ $word == --* ]]; then
            key=${word#--} given=0
            if [[ $key == *=* ]]; then given=1 key=${key%%=*}; fi
            key=${key//-/_}
            used+="$key "
        elif [[ $word != "=" || ${COMP_WORDS[i-1]} != --* ]]; then
            given=$((given + 1))
        fi
    done
    if [[ $cur == "=" && ${COMP_WORDS[COMP_CWORD-1]} == --* ]]; then cur=; fi
    if [[ $cur == --*=* ]]; then # where `=` is no word break
        key=${cur%%=*} key=${key#--} key=${key//-/_}
        _fedlora_value "$verb" "$key"
        [[ -n $words ]] && COMPREPLY=($(compgen -P "${cur%%=*}=" -W "$words" -- "${cur#*=}"))
        return
    fi
    if [[ $cur != -* ]]; then
        _fedlora_value "$verb" "${key:-first}"
        if [[ $kind == many || ($kind == one && $given == 0) ]]; then
            [[ -n $words ]] && COMPREPLY=($(compgen -W "$words" -- "$cur"))
            [[ -n $path ]] && _fedlora_complete_path "$path" "$cur"
            if [[ -n $key && ($kind == one || $given == 0) ]]; then return; fi
        fi
        # Among the values that several may follow, or files, options would only disturb.
        if [[ -n $cur || ${#COMPREPLY[@]} -gt 0 ]]; then return; fi
    fi
    for word in $(_fedlora_options "$verb"); do
        key=${word#--}
        [[ $used == *" $key "* ]] || all+="$word "
    done
    COMPREPLY=($(compgen -W "$all" -- "$cur"))
}

complete -F _fedlora fedlora
"""


def bash(verbs: Mapping[str, Verb]) -> str:
    """The script for bash, from version 3.2 on."""
    options, values = [], []
    for name, one in verbs.items():
        every = " ".join(f"--{option}" for option in one.options)
        options.append(f"        {name}) echo {shlex.quote(every)} ;;")
    for names, option in _alike(verbs):
        patterns = "|".join(names)
        settings = [f"kind={_kind(option)}"]
        settings += [f"path={option.path}"] if option.path else []
        settings += [f"words={shlex.quote(' '.join(option.values))}"] if option.values else []
        values.append(f"        {patterns}) {' '.join(settings)} ;;")
    script = _BASH.replace("@OPTIONS@", "\n".join(options)).replace("@VALUES@", "\n".join(values))
    return script.replace("@VERBS@", " ".join(verbs))


def _kind(option: Option) -> str:
    return "flag" if option.flag else "many" if option.many else "one"


def _alike(verbs: Mapping[str, Verb]) -> list[tuple[list[str], Option]]:
    """`verb/option` of all that are completed in the same way; `verb/first` stands first."""
    groups: dict[tuple[Any, ...], tuple[list[str], Option]] = {}
    for name, one in verbs.items():
        first = {"first": one.first or Option(flag=True)}
        for key, option in {**one.options, **first}.items():
            if key == "first" or option.flag or option.many or option.values or option.path:
                alike = (option.flag, option.many, option.values, option.path)
                groups.setdefault(alike, ([], option))[0].append(f"{name}/{key}")
    return list(groups.values())


# --- zsh ---

_ZSH = r"""#compdef fedlora
# zsh completion for fedlora; made by `fedlora completion zsh`

_fedlora_options() {
    case $1 in
@OPTIONS@
    esac
}

_fedlora_value() {
    kind=one path_kind= words_of=()
    case $1/$2 in
@VALUES@
    esac
}

_fedlora() {
    local verb key= word kind path_kind given=0 i option
    local -a verbs all_of left words_of
    verbs=(
@VERBS@
    )
    if (( CURRENT == 2 )); then
        _describe verb verbs
        return
    fi
    verb=$words[2]
    local -A used
    for (( i = 3; i < CURRENT; i++ )); do
        word=$words[i]
        if [[ $word == --* ]]; then
            key=${${word#--}%%=*} given=0
            [[ $word == *=* ]] && given=1
            key=${key//-/_}
            used[$key]=1
        else
            (( given++ ))
        fi
    done
    local current=$words[CURRENT]
    if [[ $current == --*=* ]]; then
        key=${${current#--}%%=*} key=${key//-/_}
        _fedlora_value $verb $key
        compset -P '*='
        (( $#words_of )) && compadd -a words_of
        [[ $path_kind == directory ]] && _files -/
        [[ $path_kind == file ]] && _files
        return
    fi
    if [[ $current != -* ]]; then
        _fedlora_value $verb ${key:-first}
        if [[ $kind == many || ( $kind == one && $given == 0 ) ]]; then
            (( $#words_of )) && compadd -a words_of
            [[ $path_kind == directory ]] && _files -/
            [[ $path_kind == file ]] && _files
            [[ -n $key && ( $kind == one || $given == 0 ) ]] && return
        fi
        [[ -n $current ]] && return
    fi
    _fedlora_options $verb
    for option in $all_of; do
        [[ -n ${used[${${option%%:*}#--}]} ]] || left+=("$option")
    done
    _describe -o option left
}

if [[ $funcstack[1] == _fedlora ]]; then
    _fedlora "$@"
else
    compdef _fedlora fedlora
fi
"""


def zsh(verbs: Mapping[str, Verb]) -> str:
    """The script for zsh."""
    options, values = [], []
    for name, one in verbs.items():
        described = (_described(f"--{key}", option.what) for key, option in one.options.items())
        options.append(f"        {name}) all_of=(\n{_lines(described)}\n        ) ;;")
    for names, option in _alike(verbs):
        settings = [f"kind={_kind(option)}"]
        settings += [f"path_kind={option.path}"] if option.path else []
        settings += [f"words_of=({shlex.join(option.values)})"] if option.values else []
        values.append(f"        {'|'.join(names)}) {'; '.join(settings)} ;;")
    described = (_described(name, one.about) for name, one in verbs.items())
    script = _ZSH.replace("@OPTIONS@", "\n".join(options)).replace("@VALUES@", "\n".join(values))
    return script.replace("@VERBS@", _lines(described, 8))


def _described(word: str, about: str) -> str:
    return shlex.quote(f"{word}:{about}" if about else word)


def _lines(words: Any, indent: int = 12) -> str:
    return "\n".join(" " * indent + word for word in words)


# --- fish ---


def fish(verbs: Mapping[str, Verb]) -> str:
    """The script for fish, which has a line for each thing to complete."""
    lines = [
        "# fish completion for fedlora; made by `fedlora completion fish`",
        "complete -c fedlora -f",
        "complete -c fedlora -n __fish_use_subcommand -l version -d 'the version'",
        "complete -c fedlora -n __fish_use_subcommand -l help -d 'all verbs'",
    ]
    for name, one in verbs.items():
        about = _fish(one.about)
        lines.append(f"complete -c fedlora -n __fish_use_subcommand -a {name} -d {about}")
    users: dict[tuple[str, Option], list[str]] = {}
    for name, one in verbs.items():
        for key, option in one.options.items():
            users.setdefault((key, option), []).append(name)
        if one.first is not None:
            lines.append(f"complete -c fedlora -n {_seen([name])}{_fish_values(one.first)}")
    for (key, option), names in users.items():
        takes = "" if option.flag else " -r" + _fish_values(option)
        about = f" -d {_fish(option.what)}" if option.what else ""
        lines.append(f"complete -c fedlora -n {_seen(names)} -l {key}{takes}{about}")
    return "\n".join(lines) + "\n"


def _seen(names: list[str]) -> str:
    return _fish("__fish_seen_subcommand_from " + " ".join(names))


def _fish_values(option: Option) -> str:
    out = " -F" if option.path == "file" else ""
    words = [*option.values]
    if option.path == "directory":
        words.append("(__fish_complete_directories)")
    return out + (f" -a {_fish(' '.join(words))}" if words else "")


def _fish(text: str) -> str:
    """In single quotes, where fish reads only `\\` and `'`."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
