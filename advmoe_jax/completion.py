"""What a shell needs to complete the commands, their flags, and the values of a config.

The script is bash's, which completes files by itself; zsh reads such scripts.
"""

import importlib
from collections.abc import Sequence

from absl import flags

from advmoe_jax import config
from advmoe_jax.runs import rows

_SCRIPT = """\
# Completion of advmoe, for bash. To install it, for every shell that is opened afterwards:
#   mkdir -p ~/.local/share/bash-completion/completions
#   advmoe --completion=bash > ~/.local/share/bash-completion/completions/advmoe
# For zsh, in ~/.zshrc:
#   autoload -U +X compinit && compinit; autoload -U +X bashcompinit && bashcompinit
#   source FILE                                       # which holds this
_advmoe_files() {                                     # those that begin with $1
    if [ -n "$ZSH_VERSION" ]; then compgen -G "$1*"; else compgen -f -- "$1"; fi
}
_advmoe() {
    local line="${COMP_LINE:0:$COMP_POINT}" words
    local word="${line##* }"                          # whole: "=" is a break for bash
    local cur="${COMP_WORDS[COMP_CWORD]}"
    COMPREPLY=()
    case "${COMP_WORDS[1]}" in
@cases@
    *) words="@commands@" ;;
    esac
    if [ "$COMP_CWORD" = 1 ]; then
        COMPREPLY=($(compgen -W "@commands@" -- "$cur"))
        return
    fi
    case "$word" in
    *=*)
        local flag="${word%%=*}=" one start=""
        [ -n "$ZSH_VERSION" ] && start="$flag"        # "=" is no break for zsh
        for one in $words; do                         # a flag with a list of values
            case "$one" in "$flag"?*)
                COMPREPLY+=($(compgen -P "$start" -W "${one#*=}" -- "${word#*=}")) ;;
            esac
        done
        if [ ${#COMPREPLY[@]} = 0 ]; then
            for one in $(_advmoe_files "${word#*=}"); do COMPREPLY+=("$start$one"); done
        fi
        ;;
    -*)
        for one in $words; do                         # up to "="
            case "$one" in
            "$word"*=*) COMPREPLY+=("${one%%=*}=") ;;
            "$word"*) COMPREPLY+=("$one") ;;
            esac
        done
        COMPREPLY=($(printf '%s\\n' "${COMPREPLY[@]}" | sort -u))
        ;;
    *) COMPREPLY=($(_advmoe_files "$cur")) ;;
    esac
    case "${COMPREPLY[*]}" in *=) compopt -o nospace 2>/dev/null ;; esac
}
complete -o filenames -F _advmoe advmoe
"""


def script(commands: Sequence[str]) -> str:
    """The completion script for bash; ``commands`` are the names of the commands' modules."""
    cases = "\n".join(f'    {name}) words="{" ".join(_words(name))}" ;;' for name in commands)
    return _SCRIPT.replace("@cases@", cases).replace("@commands@", " ".join(commands))


def _words(command: str) -> list[str]:
    """The flags of a command: ``--name=``, ``--name=value`` for each value of a choice."""
    module = importlib.import_module(f"advmoe_jax.{command}")
    words = ["--help"]
    for flag in flags.FLAGS.flags_by_module_dict()[module.__name__]:
        choices = getattr(flag.parser, "enum_values", None)
        if flag.flag_type() == "bool":
            words += [f"--{flag.name}", f"--no{flag.name}"]
        else:
            words += [f"--{flag.name}={choice}" for choice in choices or [""]]
        if flag.name == "config":
            words += [f"--config.{name}=" for name in config.names(_schema(command))]
    return words


def _schema(command: str) -> config.Schema:
    """What may be named of the command's config."""
    if command != "compare":
        return config.any_schema()
    return rows.schema()
