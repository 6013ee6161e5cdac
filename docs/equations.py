"""The LaTeX of each paper tag in the scripts, and one sentence on it. docs/build.py puts both beside the lines that carry the tag.

A backslash never stands before punctuation: code hosts strip it there.
"""

EQUATIONS = {  # tag: (sentence, LaTeX of one or more lines)
    "[GRPO sec 4.1.2]": (
        "The advantage compares a completion with its own group.",
        r"A_i = \frac{R_i - \text{mean}(R_1, \ldots, R_G)}{\text{std}(R_1, \ldots, R_G) + \text{eps}}"),
    "[GRPO eq 3]": (
        "The objective is the smaller of the plain and the clipped product, as a mean over each completion and then over the group.",
        r"w_{it} = \frac{\pi(o_{it} \mid q, o_{i, \lt t})}{\pi_{\text{old}}(o_{it} \mid q, o_{i, \lt t})}",
        r"m_{it} = \text{min} ( w_{it} A_i, \text{clip}(w_{it}, 1 - \varepsilon_{\text{low}}, 1 + \varepsilon_{\text{high}}) A_i )",
        r"J = \mathbb{E} \left[ \frac{1}{G} \sum\limits_{i=1}^{G} \frac{1}{\lvert o_i \rvert} \sum\limits_{t=1}^{\lvert o_i \rvert} "
        r"( m_{it} - \beta k_{3, it} ) \right]"),
    "[GRPO eq 4]": (
        "The k3 estimator of the KL divergence to the reference policy is never negative.",
        r"k_{3, it} = \text{exp}(\log \pi_{\text{ref}} - \log \pi) - (\log \pi_{\text{ref}} - \log \pi) - 1"),
    "[DAPO sec 3.1]": (
        "The upper clip has a bound of its own. Without --epsilon_high both bounds are equal.",
        r"\varepsilon_{\text{high}} \ge \varepsilon_{\text{low}}"),
    "[DAPO sec 3.3]": (
        "Every token of the B rows of the optimizer step has the same weight, as in DAPO's released code. The paper sums over a group.",
        r"J = \mathbb{E} \left[ \frac{1}{\sum_{i=1}^{B} \lvert o_i \rvert} \sum\limits_{i=1}^{B} \sum\limits_{t} "
        r"( m_{it} - \beta k_{3, it} ) \right]"),
    "[Dr. GRPO sec 3.2]": (
        "The sum over tokens is divided by a constant length L. No length of a completion enters the weight of its tokens.",
        r"J = \mathbb{E} \left[ \frac{1}{G L} \sum\limits_{i} \sum\limits_{t} ( m_{it} - \beta k_{3, it} ) \right]"),
    "[LUFFY advantage]": (
        "The teacher's row stands in the group, so its reward is part of the mean. The flag's default leaves out the std.",
        r"A_i = R_i - \text{mean}(R_1, \ldots, R_G)"),
    "[LUFFY objective]": (
        "A teacher's token counts by its shaped probability f, an own token by its ratio w. Z is a constant. The lines put f in w's place.",
        r"J = \mathbb{E} \left[ \frac{1}{Z} \left( \sum\limits_{i \in \text{teacher}} \sum\limits_{t} f(p_{it}) A_i "
        r"+ \sum\limits_{i \in \text{own}} \sum\limits_{t} w_{it} A_i \right) \right]"),
    "[LUFFY shaping]": (
        "The weight has a gradient that peaks at p = γ and falls to 0 for p → 0.",
        r"f(p) = \frac{p}{p + \gamma} \quad \gamma = 0.1",
        r"p_{it} = \pi(o_{it} \mid q, o_{i, \lt t})",
        r"\frac{\partial f}{\partial \log p} = \frac{\gamma p}{(p + \gamma)^2}"),
    "[LUFFY code]": (
        "The released code adds 0.001 times the mean entropy of a micro-batch's tokens. Here the bonus is part of the sum; 0.0003 weighs "
        "the bonus alike at the released sizes.",
        r"J_{\text{here}} = J + 0.0003 \cdot \frac{1}{Z} \sum\limits_{i} \sum\limits_{t} H_{it}"),
    "[RePO gate]": (
        "A group is helped when the share of its failed rollouts reaches ρ.",
        r"\gamma_{\text{fail}} = \frac{1}{G} \sum\limits_{i=1}^{G} \mathbb{1} [ R(o_i) \lt \delta ]",
        r"\gamma_{\text{fail}} \ge \rho"),
    "[RePO replacement]": (
        "The policy retells the trace k. The retelling takes the place of the worst rollout.",
        r"o_{\text{rep}} \sim \pi(\cdot \mid P(q, k))",
        r"o_j \leftarrow o_{\text{rep}} \quad R(o_j) = \underset{i}{\text{min}} R(o_i)"),
    "[RePO objective]": (
        "From here on the group is an ordinary group of GRPO. The retelling is scored as an answer to q alone.",
        r"J = J_{\text{GRPO}}(o_1, \ldots, o_{\text{rep}}, \ldots, o_G \mid q)",
        r"w_t = \frac{\pi(o_{\text{rep}, t} \mid q, o_{\text{rep}, \lt t})}"
        r"{\pi_{\text{old}}(o_{\text{rep}, t} \mid q, o_{\text{rep}, \lt t})}"),
    "[PrefixRL objective]": (
        "The training set holds prefixed and plain prompts. Each prompt has a group of its own, and only own tokens are trained.",
        r"J = \mathbb{E}_{q, h} \mathbb{E}_{o \sim \pi(\cdot \mid q, y_{1:h})} R(o) "
        r"+ \mathbb{E}_{q} \mathbb{E}_{o \sim \pi(\cdot \mid q)} R(o)"),
    "[PrefixRL cuts]": (
        "A trace of L tokens gives three prefixes of different lengths h, drawn once from the seed and the problem.",
        r"h \sim \text{Uniform} \lbrace 0.4 L, \ldots, 0.8 L \rbrace"),
    "[SFT objective]": (
        "The objective is the mean log-likelihood of the traces' tokens k, EOS included, over all D of them in the optimizer step.",
        r"J = \mathbb{E}_{q, k} \left[ \frac{1}{D} \sum\limits_{t} \log \pi(k_t \mid q, k_{\lt t}) \right]"),
}
CHIEF = {"grpo": "[GRPO sec 4.1.2]", "repo": "[RePO gate]", "luffy": "[LUFFY shaping]", "prefixrl": "[PrefixRL objective]"}
