{{- define "coxswain.name" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "coxswain.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "coxswain.labels" -}}
{{ include "coxswain.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{/* The server's configuration file. */}}
{{- define "coxswain.config" -}}
{{- $config := deepCopy .Values.config -}}
{{- if hasKey $config "auth" -}}
{{- fail "config.auth: keys belong in `keys`, which makes a Secret of them" -}}
{{- end -}}
{{- if hasKey $config "adapters" -}}
{{- if not .Values.registry.url -}}
{{- fail "registry.url: replicas with adapters must share a durable Redis" -}}
{{- end -}}
{{- $_ := set $config "registry" (merge (dict "url" .Values.registry.url) (default dict $config.registry)) -}}
{{- $_ := set $config.adapters "store" (default "/var/lib/coxswain/adapters" $config.adapters.store) -}}
{{- end -}}
{{- toYaml $config -}}
{{- end -}}

{{/* Seconds that running requests may finish: the file's, or the server's default. */}}
{{- define "coxswain.drain" -}}
{{- dig "server" "drain_timeout_s" 30 .Values.config | int -}}
{{- end -}}

{{- define "coxswain.keys" -}}
{{- .Values.keys.existingSecret | default (printf "%s-keys" (include "coxswain.name" .)) -}}
{{- end -}}
